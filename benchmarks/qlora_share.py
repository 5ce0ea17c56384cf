"""How much of a step over a quantised base is spent in making numbers that can be multiplied.

In 4 bit that is ``dense()``. In int8 it is all of a product that is not a GEMM, the integer one or the adapter's: the rows are
quantised, and, by torch, the sums rescaled, which our own kernel does with the sums. The forms' methods are wrapped, on the instances.
Of int8 the GEMMs are told apart by a dispatch mode, which costs some microseconds an operator, and among our kernels by their names; so
every base takes two steps in turn, one that is watched and one that is not, and the step's time is that of the latter.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent / "arms"))
from lamina_arm import rendered

from lamina import native
from lamina.adapter_files import load_adapter
from lamina.data.render import Rendered
from lamina.model.decoder import Decoder
from lamina.model.quantised import quantised_of
from lamina.model.weights import load_model
from lamina.ops.int8 import Int8
from lamina.training.loop import Step, Training, start, train

BASES = (None, "nf4", "fp4", "int8")
BATCH = 4
GEMMS = {torch.ops.aten._int_mm, torch.ops.aten.mm, torch.ops.aten.addmm_}
"""The integer GEMM of torch, what stands in for it where that is not exact, and the adapter's."""

KERNELS = {"integer_products", "products"}
"""Our own."""


class Making:
    """Seconds spent in making numbers by the forms of a model, while it is ``on``."""

    def __init__(self, model: Decoder) -> None:
        self.on, self.seconds = False, 0.0
        for leaf in quantised_of(model):
            name = "_product" if isinstance(leaf.form, Int8) else "dense"
            setattr(leaf.form, name, self._around(getattr(leaf.form, name)))

    def _around(self, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*given: Any, **named: Any) -> Tensor:
            if not self.on:
                return method(*given, **named)
            began = time.perf_counter()
            with Gemms() as gemms:
                out = method(*given, **named)
            self.seconds += time.perf_counter() - began - gemms.seconds
            return out

        return timed


class Gemms(TorchDispatchMode):
    """Counts the seconds of the GEMMs that run under it."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self.call, native.call = native.call, self._called
        return super().__enter__()

    def __exit__(self, *what: Any) -> None:
        native.call = self.call
        super().__exit__(*what)

    def _called(self, name: str, *arguments: native.Argument, **settings: int | None) -> None:
        began = time.perf_counter()
        self.call(name, *arguments, **settings)
        self.seconds += (time.perf_counter() - began) * (name in KERNELS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in GEMMS:
            self.seconds += time.perf_counter() - began
        return out


def share(model: str, adapter: str, rows: str, rounds: int) -> dict[str, Any]:
    """By base: seconds of a step and of the making in it, and the step's tokens; minima over rounds of the same four rows."""
    with Path(rows).open(encoding="utf-8") as file:
        examples = [rendered(json.loads(next(file)), number) for number in range(1, BATCH + 1)]
    running = {base or "dense": _running(model, adapter, base, examples) for base in BASES}
    found: dict[str, dict[str, float]] = {base: {"seconds": math.inf, "making": math.inf} for base in running}
    for _ in range(rounds):
        for base, (making, steps) in running.items():
            best = found[base]
            making.on, making.seconds = False, 0.0
            step = next(steps)
            making.on = True
            next(steps)
            best["seconds"], best["tokens"] = min(best["seconds"], step.seconds), step.tokens
            best["making"] = min(best["making"], making.seconds)
    return {"bases": found}


def _running(folder: str, adapter: str, base: str | None, rows: list[Rendered]) -> tuple[Making, Iterator[Step]]:
    model = load_model(folder, "bf16", "cpu", base=base)
    load_adapter(model, adapter)
    training = Training(epochs=1e6, batch_size=BATCH, learning_rate=2e-4, schedule="constant", warmup=0.0)
    return Making(model), train(model, rows, training, start(model, training), seed=0)
