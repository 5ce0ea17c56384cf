"""The three ways to merge: what becomes of each tensor of the base when an adapter is added to it.

``original``      W' = round(W₁₆ + ΔW), to the weights as they are stored: what most tools do, also where training saw others.
``dequantised``   W' = round(W₄ + ΔW), to the weights that training saw, made dense: base and adapter as they were, up to one
                  rounding. Matrices without an adapter are written as training saw them too.
``requantised``   W' = Q(W₁₆ + ΔW): again four bits, in the format of transformers and bitsandbytes. The sum starts from the
                  stored weights: W₄ lies on the grid of Q, and an update below half a step of that grid would vanish from
                  every number at once, where from W₁₆ it tips the numbers near a threshold, as many as it is large.
"""

from collections.abc import Iterator, Mapping
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
from lamina.model.quantised import QuantisedLinear
from lamina.model.storage import parts_of
from lamina.model.weights import read_module
from lamina.ops.fourbit import FourBit
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
        self.updates = {
            path: Update(self.adapter[f"{path}.a"], self.adapter[f"{path}.b"], module.scale)
            for path, module in adapted(self.outline).items()
        }
        _check(self.policy, self.quantised, bool(self.packed))

    def __iter__(self) -> Iterator[Piece]:
        parts = {f"{path}.{part}" for path, parts in self.packed.items() for part in parts if part != "weight"}
        for name, tensor in self.stored.items():
            path = name.removesuffix(".weight")
            rewritten = path in self.quantised if self.policy != "original" else path in self.updates
            if name in parts:
                continue  # written with their weight, or not needed any more
            if rewritten and path != name:
                yield self._rewritten(path, tensor)
            elif self.policy == "requantised":  # the whole model in the dtype in which training computed
                code = _code(self.dtype)
                yield Piece({name: Form(code, tensor.shape)}, partial(self._converted, tensor))
            else:
                yield as_stored(tensor)

    def _rewritten(self, path: str, tensor: Stored) -> Piece:
        name = f"{path}.weight"
        if self.policy == "requantised":
            form = self._form(path)
            shapes = {
                key: Form(_code(value.dtype), tuple(value.shape)) for key, value in form.state_tensors(name).items()
            }
            return Piece(shapes, partial(self._requantised, path, form))
        linear = self.quantised.get(path)
        code = _code(self.dtype) if path in self.packed else tensor.code
        shape = tensor.shape if linear is None else (linear.out_features, linear.in_features)
        return Piece({name: Form(code, shape)}, partial(self._written, path, tensor, DTYPES[code]))

    def _converted(self, tensor: Stored) -> Mapping[str, Tensor]:
        return {tensor.name: tensor.read().to(self.dtype)}

    def _written(self, path: str, tensor: Stored, dtype: torch.dtype) -> Mapping[str, Tensor]:
        return {f"{path}.weight": self._dense(path, tensor, dtype)}

    def _dense(self, path: str, tensor: Stored, dtype: torch.dtype) -> Tensor:
        """W' of a matrix that is written as numbers."""
        seen = self._seen(path)
        if seen is None or self.policy == "original":
            before = tensor.read()
        else:
            before = seen.to(dtype)
        update = self.updates.get(path)
        if update is None:
            return before
        after = _summed(before, update, before.clone())
        self.matrices.append(account(path, before, before if seen is None else seen, after, update))
        return after

    def _requantised(self, path: str, form: FourBit) -> Mapping[str, Tensor]:
        seen, update = self._seen(path), self.updates.get(path)
        assert seen is not None, "a base that is not quantised is not requantised"
        weight = seen if path in self.packed else self.stored[f"{path}.weight"].read()
        form = form.to_empty(device="cpu")
        form.store(weight if update is None else _summed(weight, update, torch.empty_like(weight, dtype=self.dtype)))
        if update is not None:
            self.matrices.append(account(path, seen, seen, form.dense(), update))
        return form.state_tensors(f"{path}.weight")

    def _seen(self, path: str) -> Tensor | None:
        """W as training saw it, where that is not as it is stored."""
        linear = self.quantised.get(path)
        if linear is None:
            return None
        linear.to_empty(device="cpu")
        read_module(linear, f"{path}.", self.stored)
        dense = linear.form.dense().clone()
        linear.to_empty(device="meta")
        return dense

    def _form(self, path: str) -> FourBit:
        own = self.quantised[path].form
        assert isinstance(own, FourBit), "refused before"
        return own


def account(name: str, base: Tensor, seen: Tensor, after: Tensor, update: Update) -> Matrix:
    """What became of a matrix.

    Args:
        base: W₀, the merged matrix of no update.
        seen: W, what training saw.
        after: W'.
    """
    size, norm, kept, missed = 0.0, 0.0, 0.0, 0.0  # ‖W‖², ‖ΔW‖², ⟨W' - W₀, ΔW⟩, ‖W' - W - ΔW‖²
    for rows in _slices(after):
        delta, wide, new = update[rows], seen[rows].float(), after[rows].float()
        size += float(torch.linalg.vector_norm(wide)) ** 2
        norm += float(torch.linalg.vector_norm(delta)) ** 2
        kept += float((new - base[rows].float()).mul_(delta).sum())
        missed += float(torch.linalg.vector_norm((new - wide).sub_(delta))) ** 2
    relative, error = ((part / size) ** 0.5 if size else float("inf") if part else 0.0 for part in (norm, missed))
    return Matrix(name, relative, error, kept / norm if norm else 1.0)


def _summed(weight: Tensor, update: Update, out: Tensor) -> Tensor:
    """W + ΔW, computed in fp32 and rounded to the dtype of ``out``."""
    for rows in _slices(weight):
        out[rows] = weight[rows].to(torch.float32, copy=True).add_(update[rows])
    return out


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


def _code(dtype: torch.dtype) -> str:
    return next(code for code, known in DTYPES.items() if known == dtype)


def config_of(pieces: Pieces) -> dict[str, Any]:
    """What of ``config.json`` is another than the base's, for what ``pieces`` writes."""
    if pieces.policy == "requantised":
        form = next(iter(pieces.quantised.values())).form
        assert isinstance(form, FourBit), "refused before"
        name = str(pieces.dtype).removeprefix("torch.")
        said = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": form.kind,
            "bnb_4bit_use_double_quant": form.nested,
            "bnb_4bit_compute_dtype": name,
            "bnb_4bit_quant_storage": "uint8",
        }
        return {"quantization_config": said, "torch_dtype": None, "dtype": name}
    return {"quantization_config": None} if pieces.packed else {}
