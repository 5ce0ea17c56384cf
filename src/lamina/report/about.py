"""What the card of a run says beside its measures: of what, with what, at which cost."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lamina.adapter import adapted
from lamina.adapter_files import fingerprint
from lamina.job import Job
from lamina.model.decoder import Decoder
from lamina.report.record import read_metrics


def about(job: Job, model: Decoder, folder: Path) -> dict[str, Any]:
    """The beginning of ``card.json``: job, base, adapter, steps and tokens, versions."""
    steps = [record for record in read_metrics(folder) if "loss" in record]
    return {
        "job": job.head.name,
        "model": job.model.model,
        "revision": job.model.revision,
        "base_fingerprint": fingerprint(model),
        "adapter_parameters": sum(m.a.numel() + m.b.numel() for m in adapted(model).values()),
        "steps": len(steps),
        "tokens": sum(step["tokens"] for step in steps),
        "supervised_tokens": sum(step["supervised_tokens"] for step in steps),
        "training_seconds": sum(step["seconds"] for step in steps),
        "memory_bytes": max(step["memory_bytes"] for step in steps),
        "versions": {name: version(name) for name in ("lamina", "torch", "transformers")},
        "device": str(model.vocabulary.device),
    }
