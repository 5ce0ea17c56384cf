"""How a checkpoint stores the weights of its linears: as numbers, or quantised by bitsandbytes, as transformers saves it.

A linear in four bits is a group of tensors: ``weight`` (two numbers a byte), ``weight.absmax``, ``weight.quant_map``, with double
quantisation ``weight.nested_absmax`` and ``weight.nested_quant_map``, and a JSON object as bytes that says how they belong
together, ``weight.quant_state.bitsandbytes__nf4``. In eight bits (LLM.int8) it is ``weight``, ``SCB`` and ``weight_format``.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lamina.errors import ModelError
from lamina.model.checkpoint import Stored
from lamina.model.quantised import Base, QuantisedLinear, device_of, new_form
from lamina.ops.fourbit import FourBit
from lamina.ops.frozen import Scratch
from lamina.ops.int8 import Int8
from lamina.ops.shapes import Float

_PART = re.compile(
    r"(?P<path>.*)\.(?P<part>weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
    r"|SCB|weight_format)"
)
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class StoredForm:
    """The form in which a checkpoint already stores its linears."""

    base: Base
    double: bool


@dataclass(frozen=True)
class Matrix:
    """The matrix of one linear in a checkpoint, whatever the form in which it is stored; it is read when it is asked for.

    Attributes:
        path: of its module.
        weight: the numbers, or the bits of a quantised matrix.
        parts: all tensors of a quantised matrix by the end of their name, as ``parts_of`` has them; empty where it is numbers.
        scratch: lends the memory that its numbers are read into.
    """

    path: str
    weight: Stored
    parts: Mapping[str, Stored]
    scratch: Scratch

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of the numbers.

        Raises:
            ModelError: a 4-bit matrix does not say its shape.
        """
        if not self.parts or "SCB" in self.parts:
            return self.weight.shape
        try:
            shape = _state(self.parts).get("shape")
        except ValueError as error:
            raise ModelError(f"{self._where}: {error}; download it again") from None
        match shape:
            case [int(outputs), int(inputs)]:
                return outputs, inputs
        raise ModelError(f"{self._where}: found the shape {shape}, expected [out, in]; download it again")

    def dense(self) -> Float[Tensor, "out D"]:
        """W in fp32, in memory that the next matrix of the same scratch overwrites; the peak is this and what is stored.

        Raises:
            ModelError: parts are missing, or do not fit.
        """
        outputs, inputs = self.shape
        if not self.parts:
            weight = self.scratch(outputs * inputs, torch.float32, torch.device("cpu")).view(outputs, inputs)
            self.weight.read_into(weight)
            return weight
        base, double = cast(Base, _kind(self.parts)), "weight.nested_absmax" in self.parts
        form = new_form(base, outputs, inputs, double, torch.float32, self.scratch)
        fill(QuantisedLinear(form, outputs, inputs, None), self.parts, self._where)
        return form.dense()

    @property
    def _where(self) -> str:
        return f"{self.weight.file}: {self.path}"


def parts_of(stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """The tensors of each linear that is stored quantised, by its path and then by the end of their name."""
    groups: dict[str, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        if match := _PART.fullmatch(name):
            groups.setdefault(match["path"], {})[match["part"]] = tensor
    for path, parts in groups.items():
        if (weight := stored.get(f"{path}.weight")) is not None:
            parts["weight"] = weight
    return groups


def form_stored(folder: Path, stored: Mapping[str, Stored]) -> StoredForm | None:
    """The form in which a checkpoint stores its linears; None where they are plain numbers.

    Raises:
        ModelError: several forms in one checkpoint, or one that is not computed.
    """
    groups = parts_of(stored)
    if not groups:
        return None
    kinds = {path: (_kind(parts), "weight.nested_absmax" in parts) for path, parts in groups.items()}
    (kind, double), _ = Counter(kinds.values()).most_common(1)[0]
    others = [path for path, found in kinds.items() if found != (kind, double)]
    match kind:
        case "nf4" | "fp4" | "int8" if not others:
            return StoredForm(kind, double)
    found = (
        f"{len(others)} otherwise, the first {others[0]} with {', '.join(sorted(groups[others[0]]))}"
        if others
        else "all"
    )
    raise ModelError(
        f"{folder}: linears stored as {kind}, and {found}; expected all of them in one of nf4, fp4, int8 as bitsandbytes writes "
        "them; download the checkpoint again"
    )


def fill(linear: QuantisedLinear, parts: Mapping[str, Stored], where: str) -> None:
    """Fills a linear with what the checkpoint stores, as it is.

    Raises:
        ModelError: parts are missing, or do not fit.
    """
    device = device_of(linear)

    def read(part: str) -> Tensor:
        if part not in parts:
            raise ModelError(
                f"{where}: found {', '.join(sorted(parts))}, expected {part} beside them; download it again"
            )
        return parts[part].read()

    try:
        match linear.form:
            case Int8() as form:
                if "weight_format" in parts and parts["weight_format"].read().any():
                    raise ModelError(f"{where}: found another order than rows (weight_format), expected rows")
                form.from_bitsandbytes(read("weight").to(device), read("SCB").to(device))
            case FourBit() as form:
                read_all = [read("weight"), read("weight.absmax"), read("weight.quant_map")]
                nested = (
                    [read(f"weight.{name}") for name in ("nested_absmax", "nested_quant_map")] if form.nested else []
                )
                packed, absmax, code, *doubled = [tensor.to(device) for tensor in read_all + nested]
                nested_absmax, nested_code = doubled or (None, None)
                form.load_stored(packed, absmax, code, nested_absmax, nested_code, _state(parts))
    except ValueError as error:
        raise ModelError(f"{where}: {error}; download it again") from None


def _kind(parts: Mapping[str, Stored]) -> str:
    if "SCB" in parts:
        return "int8"
    return next(
        (name.removeprefix(_STATE) for name in parts if name.startswith(_STATE)), "a form without its quant_state"
    )


def _state(parts: Mapping[str, Stored]) -> dict[str, Any]:
    tensor = next(part for name, part in parts.items() if name.startswith(_STATE))
    try:
        state = json.loads(bytes(tensor.read().tolist()))
    except ValueError:  # no text, or no JSON
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"{tensor.name} is no JSON object")
    return state
