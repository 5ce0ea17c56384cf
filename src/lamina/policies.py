"""The three ways to merge: what becomes of each tensor of the base when an adapter is added to it.

``original``      W' = round(W₁₆ + ΔW), to the weights as they are stored: what most tools do, also where training saw others.
``dequantised``   W' = round(W₄ + ΔW), to the weights that training saw, made dense: base and adapter as they were, up to one
                  rounding (two, where training computed in fp32 over a base that is stored in sixteen bits). Matrices without an
                  adapter are written as training saw them too.
``requantised``   W' = Q(W₁₆ + ΔW): again four bits, in the format of transformers and bitsandbytes. The sum starts from the
                  stored weights: W₄ lies on the grid of Q, and an update below half a step of that grid would vanish from
                  every number at once, where from W₁₆ it tips the numbers near a threshold, as many as it is large. A base
                  that is itself stored in four bits has no W₁₆: then it starts from W₄, and the record shows the loss.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamina.adapter import adapted
from lamina.errors import ConfigError
from lamina.model.checkpoint import DTYPES, Stored
from lamina.model.decoder import Decoder
from lamina.model.merged import Form, Piece, as_stored
from lamina.model.quantised import QuantisedLinear, linears_of
from lamina.model.storage import parts_of
from lamina.model.weights import read_module
from lamina.ops.fourbit import FourBit
from lamina.ops.frozen import SharedBuffer
from lamina.ops.rounding import NAMES
from lamina.understand.proof import Matrix, Policy

_SLICE = 1 << 20  # numbers of a matrix that are in fp32 at one time


@dataclass(frozen=True)
class Update:
    """ΔW = s·B·A of one matrix, never whole in memory."""

    a: Tensor
    b: Tensor
    scale: float

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows of ΔW, fp32."""
        return (self.b[rows].float() @ self.a.float()).mul_(self.scale)


@dataclass
class Pieces:
    """The tensors of the merged model, by policy; ``matrices`` fills while they are made.

    Args:
        outline: the base with its adapter on the ``meta`` device.
        stored: where the base's weights are.
        adapter: A and B by their name in the model.
        dtype: in which training computed.
    """

    policy: Policy
    outline: Decoder
    stored: Mapping[str, Stored]
    adapter: Mapping[str, Tensor]
    dtype: torch.dtype
    matrices: list[Matrix] = field(default_factory=list)

    def __post_init__(self) -> None:
        modules = self.outline.named_modules()
        self.quantised = {
            name.removesuffix(".base"): module for name, module in modules if isinstance(module, QuantisedLinear)
        }
        self.packed = parts_of(self.stored)
        self.spare = SharedBuffer()
        self.updates = {
            path: Update(self.adapter[f"{path}.a"], self.adapter[f"{path}.b"], module.scale)
            for path, module in adapted(self.outline).items()
        }
        _check(self.policy, self.quantised, bool(self.packed))

    def __iter__(self) -> Iterator[Piece]:
        parts = {f"{path}.{part}" for path, parts in self.packed.items() for part in parts if part != "weight"}
        for name, tensor in self.stored.items():
            path = name.removesuffix(".weight")
            if name in parts:
                continue  # written with their weight, or not needed any more
            if path == name or not (path in self.updates or (path in self.quantised and self.policy != "original")):
                yield self._kept(tensor)
            elif self.policy == "requantised" and path in self.quantised:
                yield self._packed(path)
            else:
                code = _code(self.dtype) if path in self.packed or self.policy == "requantised" else tensor.code
                linear = self.quantised.get(path)
                shape = tensor.shape if linear is None else (linear.out_features, linear.in_features)
                yield Piece({name: Form(code, shape)}, partial(self._dense, path, tensor, DTYPES[code]))

    def _kept(self, tensor: Stored) -> Piece:
        """A tensor that nothing is added to; requantised, the whole model is in the dtype in which training computed."""
        if self.policy != "requantised":
            return as_stored(tensor)
        form = {tensor.name: Form(_code(self.dtype), tensor.shape)}
        return Piece(form, lambda: {tensor.name: tensor.read().to(self.dtype)})

    def _packed(self, path: str) -> Piece:
        name, form = f"{path}.weight", self._form(path)
        shapes = {key: Form(_code(value.dtype), tuple(value.shape)) for key, value in form.state_tensors(name).items()}
        return Piece(shapes, partial(self._requantised, path))

    def _dense(self, path: str, tensor: Stored, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """W' of a matrix that is written as numbers."""
        seen = self._seen(path, tensor)
        merged = tensor.read() if self.policy == "original" or path not in self.quantised else seen.to(dtype)
        if update := self.updates.get(path):
            self.matrices.append(add(path, merged, seen, update))
        return {f"{path}.weight": merged.to(dtype)}

    def _requantised(self, path: str) -> Mapping[str, Tensor]:
        """W' of a matrix that is written in four bits again."""
        own, tensor, update = self._form(path), self.stored[f"{path}.weight"], self.updates.get(path)
        form = FourBit(own.outputs, own.inputs, own.dtype, kind=own.kind, double=own.nested, scratch=self.spare)
        seen = self._seen(path, tensor)
        weight = seen.clone() if path in self.packed else tensor.read().to(self.dtype)
        form.store(weight)
        if update is not None:
            untouched = form.dense().clone()  # W₀
            add(path, weight, seen, update)
            form.store(weight)
            self.matrices.append(account(path, untouched, seen, form.dense(), update))
        return form.state_tensors(f"{path}.weight")

    def _seen(self, path: str, tensor: Stored) -> Tensor:
        """W as training saw it: in the form of the base, or rounded to the dtype of the computation."""
        linear = self.quantised.get(path)
        if linear is None:
            return tensor.read().to(self.dtype)
        linear.to_empty(device="cpu")
        read_module(linear, f"{path}.", self.stored)
        dense = linear.form.dense().clone()
        linear.to_empty(device="meta")
        return dense

    def _form(self, path: str) -> FourBit:
        own = self.quantised[path].form
        assert isinstance(own, FourBit), "refused before"
        return own


def add(name: str, merged: Tensor, seen: Tensor, update: Update) -> Matrix:
    """Adds the update to a matrix in place, in fp32 and rounded to its dtype, and says what became of it.

    Args:
        merged: W₀, the merged matrix of no update; W' afterwards.
        seen: W, what training saw.
    """
    sums = _Sums()
    for rows in _slices(merged):
        delta, wide, base = (
            update[rows],
            seen[rows].to(torch.float32, copy=True),
            merged[rows].to(torch.float32, copy=True),
        )
        merged[rows] = base + delta
        sums.add(base, wide, merged[rows].float(), delta)
    return sums.matrix(name)


def account(name: str, base: Tensor, seen: Tensor, after: Tensor, update: Update) -> Matrix:
    """What became of a matrix: W₀ is ``base``, W is ``seen`` and W' is ``after``."""
    sums = _Sums()
    for rows in _slices(after):
        sums.add(base[rows].float(), seen[rows].float(), after[rows].float(), update[rows])
    return sums.matrix(name)


@dataclass
class _Sums:
    """Over the slices of a matrix: ‖W‖², ‖ΔW‖², ⟨W' - W₀, ΔW⟩, ‖W' - W - ΔW‖²."""

    size: float = 0.0
    norm: float = 0.0
    kept: float = 0.0
    missed: float = 0.0

    def add(self, base: Tensor, seen: Tensor, after: Tensor, delta: Tensor) -> None:
        self.size += float(torch.linalg.vector_norm(seen)) ** 2
        self.norm += float(torch.linalg.vector_norm(delta)) ** 2
        self.kept += float((after - base).mul_(delta).sum())
        self.missed += float(torch.linalg.vector_norm((after - seen).sub_(delta))) ** 2

    def matrix(self, name: str) -> Matrix:
        relative, error = (
            (part / self.size) ** 0.5 if self.size else float("inf") if part else 0.0
            for part in (self.norm, self.missed)
        )
        return Matrix(name, relative, error, self.kept / self.norm if self.norm else 1.0)


def _slices(matrix: Tensor) -> Iterator[slice]:
    step = max(1, _SLICE // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _check(policy: Policy, quantised: Mapping[str, QuantisedLinear], packed: bool) -> None:
    """Refuses a policy that means nothing for this base."""
    if policy == "original" and packed:
        raise ConfigError(
            "policy: found original, but the base is stored quantised and its original weights are not here; expected "
            "dequantised or requantised"
        )
    if policy != "original" and not quantised:
        raise ConfigError(f"policy: found {policy}, but the run's base is not quantised; expected original")
    if policy == "requantised" and not all(isinstance(linear.form, FourBit) for linear in quantised.values()):
        raise ConfigError(
            "policy: found requantised, which writes bitsandbytes' four bits; the run's base has another form; expected "
            "original or dequantised"
        )


def dense_dtype(stored: Mapping[str, Stored], paths: Iterable[str], dtype: torch.dtype) -> torch.dtype | None:
    """In which dtype a merge that writes numbers, as ``Pieces`` has it, writes most of these matrices.

    It is the one in which they are stored; of matrices that are stored quantised, ``dtype``, in which training computes. None
    where the files hold none of them as numbers that can be added to.
    """
    packed = parts_of(stored)
    weights = ((path, stored.get(f"{path}.weight")) for path in paths)
    found = Counter(dtype if path in packed else weight.dtype for path, weight in weights if weight is not None)
    return next((most for most, _ in found.most_common(1) if most in NAMES), None)


def _code(dtype: torch.dtype) -> str:
    return next(code for code, known in DTYPES.items() if known == dtype)


def config_of(pieces: Pieces) -> dict[str, Any]:
    """What of ``config.json`` is another than the base's, for what ``pieces`` writes."""
    name = str(pieces.dtype).removeprefix("torch.")
    if pieces.policy != "requantised":
        return {"quantization_config": None, "torch_dtype": None, "dtype": name} if pieces.packed else {}
    form = next(iter(pieces.quantised.values())).form
    assert isinstance(form, FourBit), "refused before"
    others = [path for path in linears_of(pieces.outline) if path.removesuffix(".base") not in pieces.quantised]
    said = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": form.kind,
        "bnb_4bit_use_double_quant": form.nested,
        "bnb_4bit_compute_dtype": name,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", *(path.removesuffix(".base") for path in others)] if others else None,
    }
    return {"quantization_config": said, "torch_dtype": None, "dtype": name}
