"""Lamina: fine-tune Llama-2 and its family with LoRA, exactly, and understand what the fine-tuning did.

Everything public is in ``lamina.__all__``. Names are imported when they are first used, so that ``import lamina`` and
``lamina --help`` load nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.adapter import LoRA as LoRA
    from lamina.adapter import attach as attach
    from lamina.adapter import detach as detach
    from lamina.adapter_files import load_adapter as load_adapter
    from lamina.adapter_files import save_adapter as save_adapter
    from lamina.data.examples import DataSettings as DataSettings
    from lamina.data.examples import read_examples as read_examples
    from lamina.data.pack import Batch as Batch
    from lamina.data.pack import pack as pack
    from lamina.data.render import render as render
    from lamina.errors import AdapterError as AdapterError
    from lamina.errors import CheckpointError as CheckpointError
    from lamina.errors import ConfigError as ConfigError
    from lamina.errors import DataError as DataError
    from lamina.errors import Error as Error
    from lamina.errors import ModelError as ModelError
    from lamina.errors import OutOfMemoryError as OutOfMemoryError
    from lamina.errors import TrainingError as TrainingError
    from lamina.evaluation import Evaluating as Evaluating
    from lamina.evaluation import evaluate as evaluate
    from lamina.explaining import explain as explain
    from lamina.generation import Sampling as Sampling
    from lamina.generation import generate as generate
    from lamina.job import Job as Job
    from lamina.job import Watching as Watching
    from lamina.jobfile import Head as Head
    from lamina.merging import merge as merge
    from lamina.model.tokenizer import load_tokenizer as load_tokenizer
    from lamina.model.weights import ModelSettings as ModelSettings
    from lamina.model.weights import load_model as load_model
    from lamina.run import Result as Result
    from lamina.run import fine_tune as fine_tune
    from lamina.run import resume as resume
    from lamina.training.loop import State as State
    from lamina.training.loop import Step as Step
    from lamina.training.loop import Training as Training
    from lamina.training.loop import start as start
    from lamina.training.loop import train as train

_HOME = {
    "adapter": ("LoRA", "attach", "detach"),
    "adapter_files": ("load_adapter", "save_adapter"),
    "data.examples": ("DataSettings", "read_examples"),
    "data.pack": ("Batch", "pack"),
    "data.render": ("render",),
    "errors": (
        "AdapterError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "Error",
        "ModelError",
        "OutOfMemoryError",
        "TrainingError",
    ),
    "evaluation": ("Evaluating", "evaluate"),
    "explaining": ("explain",),
    "generation": ("Sampling", "generate"),
    "job": ("Job", "Watching"),
    "jobfile": ("Head",),
    "merging": ("merge",),
    "model.tokenizer": ("load_tokenizer",),
    "model.weights": ("ModelSettings", "load_model"),
    "run": ("Result", "fine_tune", "resume"),
    "training.loop": ("State", "Step", "Training", "start", "train"),
}
_MODULE = {name: f"lamina.{module}" for module, names in _HOME.items() for name in names}

__all__ = [
    "AdapterError",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DataSettings",
    "Error",
    "Evaluating",
    "Head",
    "Job",
    "LoRA",
    "ModelError",
    "ModelSettings",
    "OutOfMemoryError",
    "Result",
    "Sampling",
    "State",
    "Step",
    "Training",
    "TrainingError",
    "Watching",
    "attach",
    "detach",
    "evaluate",
    "explain",
    "fine_tune",
    "generate",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "merge",
    "pack",
    "read_examples",
    "render",
    "resume",
    "save_adapter",
    "start",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)
