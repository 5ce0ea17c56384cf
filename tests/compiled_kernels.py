"""Compiles the kernels in Triton for some kinds of GPU, as a run there would: ``python compiled_kernels.py 80 90``. No GPU is needed.

Triton's interpreter runs a kernel as Python, and so takes what its compiler does not. For each kernel a line tells the kind, the name and
how many loads and stores take 16 bytes at a time, and how many do not.
"""

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamina.cuda import eights, rows, scores

HALF, ROUNDED = "*bf16", "*fp8e4nv"
WIDE = {"BLOCK": 4096}
SHORT = {"BLOCK": rows.BLOCK}
LOSS = {"WIDTH": 32_000, "DIFFERENTIATE": True, "BLOCK": scores.BLOCK}
FP8 = {"SMALLEST": 1e-30, "LARGEST": 448.0, "BLOCK": 16_384}
KERNELS = [  # kernel, types of its arguments, its constants, the first kind of GPU that has it
    (rows._norm, [HALF, HALF, HALF, "i32", "fp32"], WIDE, 80),
    (rows._norm_back, [HALF, HALF, HALF, HALF, "i32", "fp32"], WIDE, 80),
    (rows._gate, [HALF, HALF, HALF, "i32"], SHORT, 80),
    (rows._gate_back, [HALF, HALF, HALF, HALF, HALF, "i32"], SHORT, 80),
    (rows._rotate, [HALF, HALF, HALF, HALF, "i32", "i32", "i32", "fp32"], SHORT, 80),
    (scores._cross_entropy, [HALF, "*i64", "*fp32"], LOSS, 80),
    (eights._rows, [HALF, "*fp32", ROUNDED, "*fp32", "i32"], FP8, 89),
    (eights._rows, [HALF, "constexpr", ROUNDED, "*fp32", "i32"], FP8 | {"factors": None}, 89),
    (eights._turn, ["*u8", "*u8", "i32", "i32"], {"TILE": eights.TILE}, 80),
]


def compiled(kernel, types: list[str], constants: dict[str, object], kind: int) -> str:
    """The kernel's PTX, where all tensors and widths are multiples of 16, as a model's are; ptxas has taken it."""
    names = kernel.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * len(names)], strict=False))
    even = {(n,): [["tt.divisibility", 16]] for n, type_ in enumerate(types) if type_.startswith("*") or type_ == "i32"}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=even)
    options = {"num_warps": rows.warps(int(constants.get("BLOCK", 2048)))}
    made = triton.compile(source, target=GPUTarget("cuda", kind, 32), options=options)
    assert made.asm["cubin"]
    return made.asm["ptx"]


def main() -> None:
    for kind in map(int, sys.argv[1:]):
        for kernel, types, constants, first in KERNELS:
            if kind >= first:
                ptx = compiled(kernel, types, constants, kind)
                whole = len(re.findall(r"(?:ld|st)\.global\S*\.v4\.b32", ptx))
                every = len(re.findall(r"(?:ld|st)\.global", ptx))
                sys.stdout.write(f"{kind} {kernel.__name__} {whole} {every - whole}\n")


if __name__ == "__main__":
    main()
