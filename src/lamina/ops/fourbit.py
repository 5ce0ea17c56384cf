"""A frozen weight in 4 bit, NF4 or FP4, with its absmax in fp32 or, doubly quantised, in 8 bit (arXiv:2305.14314).

A product dequantises the whole weight into memory that all forms of a model share, and multiplies by that. This costs
2 bytes a weight once and about 0.2 ns a weight and core, against a multiplication by all tokens of a batch. Rejected:
products in 4 bit (bitsandbytes' ``gemm_4bit``), which win for a handful of tokens only, and whose backward pass
dequantises all the same; and a fresh tensor each time, whose page faults cost a CPU several times the kernel.

bitsandbytes' kernels dequantise where its library loads (CPU, CUDA), ``lamina.ops.blockwise`` everywhere else. On a CPU
the kernel is called by its symbol, because the op has no ``out``, and with rows of whole blocks only, because the op,
given rows that are a multiple of 16 long but not of 64, reads the wrong absmax on AVX-512 (0.50.2). Quantising on a CPU
is ours: the same bytes at four to eight times the speed.
"""

import ctypes
import json
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from lamina.ops.blockwise import (
    BLOCK,
    NESTED_BLOCK,
    Kind,
    dequantise_4bit,
    dequantise_8bit,
    on_device,
    quantise_4bit,
    quantise_8bit,
)
from lamina.ops.frozen import Scratch
from lamina.ops.library import library_for
from lamina.ops.products import Product, product
from lamina.ops.shapes import Float

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # in the kernels' names

# Numbers quantised at once, a multiple of a block. On a CPU all that a slice needs stays in a core's cache.
_SLICE, _SLICE_ELSEWHERE = 2**17, 2**24

STATE = 256
"""Bytes of the JSON that says how stored tensors belong together, spaces at its end: known before its numbers are."""


def four_bit_bytes(outputs: int, inputs: int, double: bool) -> int:
    """Bytes of a 4-bit weight [outputs, inputs] with its absmax; 0.5625 a weight, or 0.5159 with double quantisation."""
    packed, blocks, nested = _sizes(outputs * inputs)
    return packed + (blocks + 4 * nested + 4 if double else 4 * blocks)


def _sizes(numel: int) -> tuple[int, int, int]:
    blocks = -(-numel // BLOCK)
    return -(-numel // 2), blocks, -(-blocks // NESTED_BLOCK)


class FourBit(nn.Module):
    """A frozen weight W [outputs, inputs] in 4 bit; see ``store`` and ``load_stored`` for what fills it.

    Its statistics stay in fp32 whatever dtype the model is cast to.

    Args:
        dtype: in which W is dequantised and multiplied, and to which it is rounded before it is quantised.
        double: whether the absmax are quantised to 8 bit.
        scratch: lends the memory that W is dequantised into.

    Raises:
        ValueError: the dtype is not fp32, bf16 or fp16.
    """

    packed: UInt8[Tensor, " bytes"]
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self, outputs: int, inputs: int, dtype: torch.dtype, *, kind: Kind, double: bool, scratch: Scratch
    ) -> None:
        super().__init__()
        if dtype not in _NAMES:
            raise ValueError(f"a 4-bit weight is multiplied in fp32, bf16 or fp16, not in {dtype}")
        self.outputs, self.inputs, self.dtype = outputs, inputs, dtype
        self.kind, self.nested, self.scratch = kind, double, scratch
        packed, blocks, nested = _sizes(outputs * inputs)
        self.register_buffer("packed", torch.empty(packed, dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("nested_absmax", torch.empty(nested) if double else None)
        self.register_buffer("offset", torch.empty(()) if double else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourBit":
        """Moves the statistics as bits, so that ``model.to(torch.bfloat16)`` does not round them."""

        def move(buffer: Tensor) -> Tensor:
            return fn(buffer.view(torch.int32)).view(buffer.dtype) if buffer.is_floating_point() else fn(buffer)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def extra_repr(self) -> str:
        return f"{self.outputs}, {self.inputs}, {self.dtype}, kind={self.kind!r}, double={self.nested}"

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers; what ``four_bit_bytes`` foretells."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def store(self, weight: Float[Tensor, "out D"]) -> None:
        """Quantises a weight of any float dtype, rounded to ``dtype`` first, as transformers does.

        It goes slice by slice, so that the memory this takes is small; the bytes are those of the whole.
        """
        if tuple(weight.shape) != (self.outputs, self.inputs):
            raise ValueError(f"found a weight {list(weight.shape)}, expected {[self.outputs, self.inputs]}")
        values = weight.reshape(-1)
        size = _SLICE if self.packed.device.type == "cpu" else _SLICE_ELSEWHERE
        absmax = torch.empty(len(self.absmax), device=self.packed.device) if self.nested else self.absmax
        for start in range(0, len(values), size):
            stop = min(start + size, len(values))
            packed, most = _quantise(values[start:stop].to(self.packed.device, self.dtype), self.kind)
            self.packed[start // 2 : -(-stop // 2)] = packed
            absmax[start // BLOCK : -(-stop // BLOCK)] = most
        if self.nested_absmax is not None and self.offset is not None:
            self.offset.copy_(absmax.mean())
            codes, nested = _quantise_absmax(absmax - self.offset)
            self.absmax.copy_(codes)
            self.nested_absmax.copy_(nested)

    def dense(self) -> Float[Tensor, "out D"]:
        """W as the products see it, in ``dtype``: code[place] · absmax, in memory that the next call may overwrite."""
        count, device = self.outputs * self.inputs, self.packed.device
        absmax = self._expanded()
        library = library_for(device.type)
        if library is None:
            out = dequantise_4bit(self.packed, absmax, self.kind, count, self.dtype)
        else:
            out = self.scratch(count, self.dtype, device)
            if device.type == "cpu":
                _dequantise_on_cpu(library, self.packed, absmax, self.kind, out.view(self.outputs, self.inputs))
            else:
                given = (self.packed, absmax, BLOCK, self.kind, [count], self.dtype)
                torch.ops.bitsandbytes.dequantize_4bit.out(*given, out=out)
        return out.view(self.outputs, self.inputs)

    def _expanded(self) -> Tensor:
        """The absmax in fp32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        if library_for(self.absmax.device.type) is None:
            return dequantise_8bit(self.absmax, self.nested_absmax).add_(self.offset)
        given = (self.nested_absmax, on_device("dynamic", self.absmax.device), NESTED_BLOCK, torch.float32)
        expanded: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(self.absmax, *given)
        return expanded.add_(self.offset)

    def multiply(
        self, x: Float[Tensor, "N D"], bias: Float[Tensor, " out"] | None = None, *beside: Product
    ) -> Float[Tensor, "N out"]:
        """Computes x·Wᵀ + b and adds the products ``beside``."""
        return product((x, self.dense().t()), *beside, bias=bias)

    def multiply_back(self, grad: Float[Tensor, "N out"], *beside: Product) -> Float[Tensor, "N D"]:
        """Computes grad·W, the gradient of x, and adds the products ``beside``."""
        return product((grad, self.dense()), *beside)

    def load_stored(
        self,
        packed: Tensor,
        absmax: Tensor,
        quant_map: Tensor,
        nested_absmax: Tensor | None,
        nested_quant_map: Tensor | None,
        state: dict[str, Any],
    ) -> None:
        """Takes over what transformers saved of a weight, as it is.

        Only the dtype in ``state`` is passed over: W comes in this form's.

        Args:
            packed: saved under the weight's own name, the other tensors under ``….absmax`` and so on.
            state: decoded from the JSON in ``….quant_state.bitsandbytes__nf4`` (or ``__fp4``).

        Raises:
            ValueError: lists what does not fit this form; nothing is taken over then.
        """
        given = {"packed": packed, "absmax": absmax, "nested_absmax": nested_absmax}
        faults = [*self._faults(state), *_map_faults("quant_map", quant_map, self.kind)]
        if self.nested:
            faults += _map_faults("nested_quant_map", nested_quant_map, "dynamic")
        # Models that are sharded for training have their bytes saved as numbers of other dtypes.
        raw = {**given, "packed": packed.contiguous().view(torch.uint8)}
        buffers = {name: getattr(self, name) for name in given}
        faults += [
            f"{name} is {_describe(raw[name])}, expected {_describe(buffer)}"
            for name, buffer in buffers.items()
            if _describe(raw[name]) != _describe(buffer)
        ]
        if faults:
            raise ValueError("the stored 4-bit weight does not fit: " + "; ".join(faults))
        for name, buffer in buffers.items():
            if buffer is not None:
                buffer.copy_(raw[name].view(-1))  # type: ignore[union-attr]
        if self.offset is not None:
            self.offset.fill_(state["nested_offset"])

    def _faults(self, state: dict[str, Any]) -> list[str]:
        shape = state.get("shape")
        found = {
            **state,
            "shape": tuple(shape) if isinstance(shape, list | tuple) else shape,
            "dtype": self._layout()["dtype"],
        }
        faults = [
            f"{name} is {found.get(name)}, expected {value}"
            for name, value in self._layout().items()
            if found.get(name) != value
        ]
        if self.nested and not isinstance(state.get("nested_offset"), float):
            faults.append(f"nested_offset is {state.get('nested_offset')}, expected a number")
        return faults

    def _layout(self) -> dict[str, Any]:
        """What of the form is no tensor and known before it is filled, by bitsandbytes' names and in its order."""
        dtype = str(self.dtype).removeprefix("torch.")
        layout = {"quant_type": self.kind, "blocksize": BLOCK, "dtype": dtype, "shape": (self.outputs, self.inputs)}
        return {**layout, **({"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"} if self.nested else {})}

    def state_tensors(self, prefix: str) -> dict[str, Tensor]:
        """What transformers saves of the weight called ``prefix``, for ``load_stored`` and bitsandbytes to read."""
        device, state = self.packed.device, self._layout()
        tensors = {
            prefix: self.packed[:, None],
            f"{prefix}.absmax": self.absmax,
            # A copy each, as safetensors refuses memory that tensors share.
            f"{prefix}.quant_map": on_device(self.kind, device).clone(),
        }
        if self.nested_absmax is not None and self.offset is not None:
            tensors[f"{prefix}.nested_absmax"] = self.nested_absmax
            tensors[f"{prefix}.nested_quant_map"] = on_device("dynamic", device).clone()
            state["nested_offset"] = None if self.offset.is_meta else self.offset.item()
        text = bytearray(json.dumps(state).ljust(STATE).encode())
        tensors[f"{prefix}.quant_state.bitsandbytes__{self.kind}"] = torch.frombuffer(text, dtype=torch.uint8)
        return tensors


def _describe(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.numel()} × {str(tensor.dtype).removeprefix('torch.')}"


def _map_faults(name: str, found: Tensor | None, code: Any) -> list[str]:
    """Whether a stored code is ours. The last bits of a code depend on the version of torch that computed it."""
    if found is None:
        return [f"{name} is absent, expected the values of {code}"]
    expected = on_device(code, torch.device("cpu"))
    if found.shape == expected.shape and torch.allclose(found.cpu().float(), expected, rtol=0, atol=1e-6):
        return []
    return [f"{name} is {found.numel()} other values, expected the {len(expected)} values of {code}"]


def _quantise(values: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    if values.device.type == "cpu" or library_for(values.device.type) is None:
        return quantise_4bit(values, kind)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(values, BLOCK, kind, torch.uint8)
    return packed.view(-1), absmax


def _quantise_absmax(absmax: Tensor) -> tuple[Tensor, Tensor]:
    if library_for(absmax.device.type) is None:
        return quantise_8bit(absmax)
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise(absmax, on_device("dynamic", absmax.device), NESTED_BLOCK)
    return codes, nested


def _dequantise_on_cpu(library: Any, packed: Tensor, absmax: Tensor, kind: Kind, out: Tensor) -> None:
    """Dequantises into ``out`` [out, in] by the kernel behind ``torch.ops.bitsandbytes.dequantize_4bit``.

    Where the rows are not of whole blocks, the blocks stand in for them, and a shorter last one is the row of a second
    call. Where bf16 would be subnormal, AVX-512 gives zero.
    """
    kernel = library[f"cdequantize_blockwise_cpu_{kind}_{_NAMES[out.dtype]}"]
    width = out.shape[1] if out.shape[1] % BLOCK == 0 else BLOCK
    whole, rest = divmod(out.numel(), width)
    for start, rows, columns in ((0, whole, width), (whole * width, 1, rest)):
        if rows and columns:
            places = (packed[start // 2 :], absmax[start // BLOCK :], out.view(-1)[start:])
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in places]
            kernel(*pointers, *map(ctypes.c_longlong, (BLOCK, rows, columns)))
