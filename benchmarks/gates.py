"""The gates: what must hold before a speed is worth a line (every arm trains the same thing, and all of it)."""

import math
from pathlib import Path
from typing import Any

from catalogue import REFERENCE

LOSS = 1e-4
GRADIENT = 1e-5
APPROXIMATE = 0.02
"""Relative distance of the loss of a base that rounds activations to eight bits: it is a row of its own, with its own name."""


def faults(
    name: str, report: dict[str, Any], reference: dict[str, Any], exact: bool, approximate: bool = False
) -> list[str]:
    """Why an arm's fp32 run does not pass, beside the plain PEFT loop's; nothing if it does.

    Args:
        exact: also compare the gradient of every matrix.
        approximate: whether the arm's products are rounded to eight bits.
    """
    found = []
    if report["silent"]:
        found.append(f"alive: {len(report['silent'])} matrices without a gradient, first {report['silent'][0]}")
    counts, expected = ([(s["tokens"], s["supervised"]) for s in r["steps"]] for r in (report, reference))
    if counts != expected:
        found.append(f"counts: found (real, supervised) tokens {counts}, the reference's are {expected}")
    for number, (ours, theirs) in enumerate(zip(report["steps"], reference["steps"], strict=True), 1):
        distance = abs(ours["loss"] / theirs["loss"] - 1)
        limit = APPROXIMATE if approximate else LOSS
        if not distance <= limit:
            found.append(f"fp32: the loss of step {number} differs by {distance:.1e} relative, more than {limit:.0e}")
    if exact:
        distances = gradient_distances(report["gradients"], reference["gradients"])
        worst = max(distances, key=distances.__getitem__)
        print(
            f"  {name}: gradients of {len(distances)} matrices within {distances[worst]:.1e} relative of {REFERENCE}'s"
        )
        if not distances[worst] <= GRADIENT:
            found.append(f"fp32: the gradient of {worst} differs by {distances[worst]:.1e}, more than {GRADIENT:.0e}")
    return found


def gradient_distances(ours: Path, theirs: Path) -> dict[str, float]:
    """|g - g'| / |g'| of each matrix, in the 2-norm; infinite where that is no number, and where a file lacks the matrix."""
    from safetensors.torch import load_file

    a, b = load_file(ours), load_file(theirs)
    if a.keys() != b.keys():
        return dict.fromkeys(a.keys() ^ b.keys(), float("inf"))
    distances = {name: float((a[name].double() - b[name].double()).norm() / b[name].double().norm()) for name in a}
    return {name: math.inf if math.isnan(distance) else distance for name, distance in distances.items()}
