"""A hash that tells one base from another: its shape, its norms and biases, and some rows of each of its matrices.

Rows are taken at equal distances from every matrix, so a model into which an adapter was merged differs from its base. They
are rounded to bf16: the hash is the same for every dtype in which the base is loaded, and for its files.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from lamina.model.architecture import Architecture
from lamina.model.checkpoint import Stored
from lamina.model.decoder import Decoder

ROWS = 8
"""Rows of a matrix that count: of a model of 7 B parameters 20 MB, hashed within a tenth of a second."""

LONG = 32_768
"""Numbers of a vector from which on only pieces of it count: longer than any norm or bias."""


@torch.no_grad()
def fingerprint(model: Decoder) -> str:
    """The fingerprint of a model's base, whether or not an adapter lies on it; of a quantised one that of its files."""
    if model.fingerprint is not None:
        return model.fingerprint
    # An adapted linear holds the frozen one as its ``base``; A and B have names of their own.
    tensors = {
        name.replace(".base.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith((".weight", ".bias"))
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    return _digest(model.architecture, shapes, lambda name, every: tensors[name][::every])


def stored_fingerprint(architecture: Architecture, stored: Mapping[str, Stored]) -> str:
    """The fingerprint of a base on disk, of which only the rows that count are read."""

    def rows(name: str, every: int) -> Tensor:
        tensor = stored[name]
        if len(tensor.shape) < 2 or tensor.code == "U8":
            return _some(tensor)
        size = tensor.shape[1] * tensor.dtype.itemsize
        starts = range(tensor.start, tensor.start + tensor.size, every * size)
        return torch.stack([replace(tensor, shape=tensor.shape[1:], start=start).read() for start in starts])

    return _digest(architecture, {name: tensor.shape for name, tensor in stored.items()}, rows)


def _some(tensor: Stored) -> Tensor:
    """A vector, or of what is long without rows, as the parts of a quantised matrix are, some pieces at equal distances."""
    flat = replace(tensor, shape=(prod(tensor.shape),))
    if flat.shape[0] <= LONG:
        return flat.read()
    every = flat.shape[0] // ROWS
    piece = replace(flat, shape=(LONG // ROWS,))
    return torch.cat([replace(piece, start=flat.start + n * every * flat.dtype.itemsize).read() for n in range(ROWS)])


def _digest(a: Architecture, shapes: Mapping[str, tuple[int, ...]], rows: Callable[[str, int], Tensor]) -> str:
    """Hashes names, shapes and rows: of a matrix those at a distance that leaves about ``ROWS``, of a vector all."""
    digest = hashlib.sha256(f"{a.family} {a.layers} {a.heads} {a.kv_heads} {a.mlp_width}".encode())
    for name, shape in sorted(shapes.items()):
        digest.update(f"{name} {list(shape)}".encode())
        part = rows(name, max(1, shape[0] // ROWS) if len(shape) > 1 else 1)
        digest.update(part.to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
