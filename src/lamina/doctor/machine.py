"""Rules about the machine: memory, precisions, and settings that have no effect on it."""

from collections.abc import Iterator

from lamina.doctor.case import Case
from lamina.doctor.finding import Finding
from lamina.model.weights import pick_device
from lamina.planning import size

BF16_SINCE = (8, 0)
"""The compute capability (Ampere) from which on a GPU multiplies bf16 in hardware."""


def memory(case: Case) -> Iterator[Finding]:
    """A run that does not fit."""
    planned = case.planned
    if planned is None or planned.fits:
        return
    ways = "; or ".join(f"{flags} ({size(taken)})" for flags, taken in planned.ways_out)
    smaller = "a smaller base; or, " if planned.plan.items["runtime"] <= planned.free else ""
    yield Finding(
        "memory",
        "error",
        planned.beyond,
        "it would be refused before its first step, or end when memory runs out",
        ways or f"{smaller}to try it all the same, {planned.enough}",
    )


def precision(case: Case) -> Iterator[Finding]:
    """Precisions that are known to fail or to gain nothing."""
    model = case.job.model
    if model.base == "fp4":
        yield Finding(
            "base-fp4",
            "note",
            "the base is kept in fp4",
            "nf4 takes the same memory and is closer to the weights: MMLU 53.1 against 52.2 (Dettmers et al. 2023, arXiv:2305.14314)",
            "--base nf4",
        )
    if model.base in ("int8", "fp8"):
        slow = model.base == "fp8" and pick_device(model.device).type == "cpu"
        yield Finding(
            "approximate-base",
            "note",
            f"the base is kept in {model.base}, which rounds the activations too{'; on a CPU it is emulated' if slow else ''}",
            "losses come out a little higher, and gradients are not exact; a CPU takes several times as long for fp8",
            "--base nf4 for less memory, or no --base where the memory suffices",
        )
    if model.base in ("nf4", "fp4") and model.dtype == "fp32":
        yield Finding(
            "fp32-over-four-bits",
            "note",
            f"the base is kept in {model.base}, and computed with in fp32",
            "the activations take twice the memory, for digits that the base has lost",
            "--dtype bf16",
        )


def bf16_in_software(case: Case) -> Iterator[Finding]:
    """bf16 on a GPU that emulates it."""
    if case.job.model.dtype != "bf16" or pick_device(case.job.model.device).type != "cuda":
        return
    import torch

    if (found := torch.cuda.get_device_capability()) < BF16_SINCE:
        yield Finding(
            "bf16-in-software",
            "warning",
            f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, bf16 needs {BF16_SINCE[0]}.{BF16_SINCE[1]}",
            "older GPUs emulate bf16, several times slower; fp16 instead is no way out: a fifth of 7B runs fail with it",
            "--dtype fp32, or a newer GPU",
        )


def optimizer(case: Case) -> Iterator[Finding]:
    """A paged optimiser without pages."""
    kind = case.job.train.optimizer
    if kind.startswith("paged") and pick_device(case.job.model.device).type == "cpu":
        yield Finding(
            "paged-optimizer",
            "error",
            f"optimizer {kind} on a CPU",
            "its pages live in CUDA's unified memory; the run would be refused",
            f"--optimizer {kind.removeprefix('paged-')}",
        )


def checkpointing(case: Case) -> Iterator[Finding]:
    """A setting of checkpointing that has no effect."""
    train, device = case.job.train, pick_device(case.job.model.device).type
    if not train.offload_checkpoints or (device == "cuda" and train.checkpoint_layers != 0):
        return
    reason = "no layer is checkpointed" if device == "cuda" else "the model is in the host's memory already"
    yield Finding(
        "unused-checkpointing",
        "warning",
        f"offload_checkpoints is set, but {reason}",
        "a setting that has no effect hides that the memory it was to save is still needed",
        "--no-offload-checkpoints, or --checkpoint-layers none, which lets the plan choose",
    )


RULES = (memory, precision, bf16_in_software, optimizer, checkpointing)
