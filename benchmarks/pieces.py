"""Rates of the pieces of a step on a GPU, at Llama-2-7B's sizes and 8,192 tokens: what a choice between kernels is made from.

Products in bf16 and FP8, an adapter's narrow products, FlashAttention-2 beside cuDNN's kernel (and what that takes to plan for new
lengths), and the kernels of ``lamina.cuda`` with the share of the memory's rate that they reach. Prints a table; writes nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import machine
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from workload import MODELS, SEED, Shape

ROUNDS = 20
Row = tuple[str, float, str]  # what, milliseconds, the rate


def milliseconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The mean of some rounds by the device's own clock, after three that do not count."""
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / rounds


def random(*shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


def rated(what: str, work: Callable[[], object], flops: float = 0, moved: float = 0) -> Row:
    """A row: TFLOP/s of products, TB/s (read and written) of all else."""
    took = milliseconds(work)
    rate = f"{flops / took / 1e9:.0f} TFLOP/s" if flops else f"{moved / took / 1e9:.2f} TB/s"
    return what, took, rate


def products(shape: Shape, tokens: int) -> Iterator[Row]:
    """The frozen products and an adapter's."""
    for out, into in ((shape.width, shape.width), (shape.mlp, shape.width), (shape.width, shape.mlp)):
        x, weight, grad = random(tokens, into), random(out, into, std=0.02), random(tokens, out)
        a, b, inner = random(shape.rank, into), random(out, shape.rank), random(tokens, shape.rank)
        size, flops = f"{out}×{into}", 2.0 * tokens * out * into
        yield rated(f"{size} x·Wᵀ", partial(F.linear, x, weight), flops)
        yield rated(f"{size} g·W", partial(torch.mm, grad, weight), flops)
        yield rated(f"{size} x·Aᵀ", partial(F.linear, x, a), moved=x.nbytes)
        yield rated(f"{size} y + n·Bᵀ", partial(grad.addmm_, inner, b.t()), moved=2 * grad.nbytes)
        yield rated(f"{size} g·B", partial(torch.mm, grad, b), moved=grad.nbytes)
        summed = partial(torch.mm, out_dtype=torch.float32)
        yield rated(f"{size} nᵀ·x, fp32", partial(summed, inner.t(), x), moved=x.nbytes)
        yield rated(f"{size} gᵀ·n, fp32", partial(summed, grad.t(), inner), moved=grad.nbytes)


def in_fp8(shape: Shape, tokens: int) -> Iterator[Row]:
    """Products in e4m3 with a scale a row, sums kept apart from the fast ones, and their distance from the exact sums."""
    from lamina.cuda import eights
    from lamina.ops.fp8 import quantise_rows

    for out, into in ((shape.width, shape.width), (shape.mlp, shape.width), (shape.width, shape.mlp)):
        x = random(tokens, into)
        (codes, scale), (weight, factors) = quantise_rows(x), quantise_rows(random(out, into, std=0.02))
        size, flops, given = (
            f"{out}×{into}",
            2.0 * tokens * out * into,
            (codes, weight.t(), scale, factors.t().contiguous()),
        )
        exact = codes[:128].double() @ weight.double().t() * scale[:128].double() * factors.double().t()
        for fast in (False, True):
            work = partial(torch._scaled_mm, *given, out_dtype=torch.bfloat16, use_fast_accum=fast)
            off = (work()[:128].double() - exact).norm() / exact.norm()
            what, took, rate = rated(f"{size} fp8{', fast sums' * fast}", work, flops)
            yield what, took, f"{rate}, {off:.1e} off"
        yield rated(f"{size} rows to fp8", partial(quantise_rows, x), moved=1.5 * x.nbytes)
        stored, turned = weight.view(torch.uint8), torch.empty(into, out, dtype=torch.uint8, device="cuda")
        yield rated(f"{size} transpose", partial(eights.transpose, stored, turned), moved=2 * weight.nbytes)


def lengths_of(tokens: int, random_: np.random.Generator) -> list[int]:
    """Lengths like guanaco's, cut at 512, that sum to ``tokens``."""
    found: list[int] = []
    while sum(found) < tokens:
        found.append(int(np.clip(random_.lognormal(np.log(377), 0.7), 16, 512)))
    found[-1] -= sum(found) - tokens
    return [length for length in found if length]


def attention(shape: Shape, tokens: int) -> Iterator[Row]:
    """FlashAttention-2 beside cuDNN's kernel, over the same examples; then cuDNN's first call at other lengths."""
    ops, drawn = torch.ops.aten, np.random.default_rng(SEED)
    q, k, v, grad = (random(tokens, shape.heads, shape.width // shape.heads) for _ in range(4))
    lengths = lengths_of(tokens, drawn)
    flops = 2.0 * shape.width * sum(length * length for length in lengths)

    def starts(some: list[int]) -> tuple[Tensor, Tensor, int, int]:
        tensor = torch.tensor([0, *some]).cumsum(0, dtype=torch.int32).cuda()
        return tensor, tensor, max(some), max(some)

    def flash(at: tuple[Tensor, Tensor, int, int]) -> tuple[Tensor, ...]:
        return ops._flash_attention_forward(q, k, v, *at, 0.0, True, return_debug_mask=False)

    def cudnn(at: tuple[Tensor, Tensor, int, int]) -> tuple[Tensor, ...]:
        return ops._cudnn_attention_forward(q, k, v, None, *at, True, 0.0, True, False)

    def cudnn_back(at: tuple[Tensor, Tensor, int, int], made: tuple[Tensor, ...]) -> object:
        return ops._cudnn_attention_backward(grad, q, k, v, *made[:2], *made[6:8], None, *at, 0.0, True)

    at = starts(lengths)
    out, normaliser, *state, _ = flash(at)
    yield rated("FlashAttention-2, forward", partial(flash, at), flops)
    back = partial(ops._flash_attention_backward, grad, q, k, v, out, normaliser, *at, 0.0, True, *state)
    yield rated("FlashAttention-2, backward", back, 2.5 * flops)
    made = cudnn(at)
    yield rated("cuDNN, forward", partial(cudnn, at), flops)
    yield rated("cuDNN, backward", partial(cudnn_back, at, made), 2.5 * flops)
    for _ in range(3):
        other = starts(lengths_of(tokens, drawn))
        torch.cuda.synchronize()
        began = time.perf_counter()
        cudnn_back(other, cudnn(other))
        torch.cuda.synchronize()
        yield "cuDNN, both, new lengths", (time.perf_counter() - began) * 1e3, "host's clock"


def kernels(shape: Shape, tokens: int) -> Iterator[Row]:
    """The kernels of ``lamina.cuda``, a copy beside them, and a matrix from NF4."""
    from lamina.cuda import rows, scores
    from lamina.ops.fourbit import FourBit
    from lamina.ops.frozen import SharedBuffer

    x, weight = random(tokens, shape.width), random(shape.width)
    gate, up, grad = (random(tokens, shape.mlp) for _ in range(3))
    heads = x.view(tokens, shape.heads, -1)
    angles = random(tokens, heads.shape[2] // 2)
    logits, losses = random(2048, shape.vocabulary), torch.empty(2048, device="cuda")
    targets = torch.randint(shape.vocabulary, (2048,), device="cuda")
    yield rated("copy", partial(gate.copy_, up), moved=2 * gate.nbytes)
    yield rated("norm", partial(rows.norm, x, weight, 1e-5), moved=2 * x.nbytes)
    yield rated("norm, backward", partial(rows.norm_back, x, weight, x, 1e-5), moved=3 * x.nbytes)
    yield rated("norm, torch's", partial(F.rms_norm, x, weight.shape, weight, 1e-5), moved=2 * x.nbytes)
    yield rated("gate", partial(rows.gate, gate, up), moved=3 * gate.nbytes)
    yield rated("gate, backward", partial(rows.gate_back, gate, up, grad), moved=5 * gate.nbytes)
    yield rated("rotation", partial(rows.rotate, heads, angles, angles, 1.0), moved=2 * x.nbytes)
    loss = partial(scores.cross_entropy, logits, targets, losses, differentiate=True)
    yield rated("loss of 2,048 rows", loss, moved=2 * logits.nbytes)
    form = FourBit(shape.mlp, shape.width, torch.bfloat16, kind="nf4", double=True, scratch=SharedBuffer()).cuda()
    form.store(random(shape.mlp, shape.width, std=0.02))
    yield rated("nf4 to bf16", form.dense, moved=form.nbytes + 2 * shape.mlp * shape.width)


PARTS = {"products": products, "fp8": in_fp8, "attention": attention, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("pieces.py: found no CUDA device, expected one")
    print(f"{machine.machine('cuda')}\ncommit {machine.commit()}, torch {torch.__version__}\n", flush=True)
    torch.manual_seed(SEED)
    for name in options.only.split(","):
        try:
            for what, took, rate in PARTS[name](MODELS["7b"], options.tokens):
                print(f"{what:32}{took:10.3f} ms  {rate}", flush=True)
        except RuntimeError as error:  # what one version of torch lacks is no reason to leave out the rest
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
