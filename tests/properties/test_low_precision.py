"""What holds for every shape and size of number: the bounds of quantisation, and the products of quantised numbers."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_precision import FP32, UNIT, emulated, made
from torch import Tensor

from lamina.ops.fp8 import Fp8
from lamina.ops.int8 import Int8

fast = settings(max_examples=40, deadline=None)
sides = st.integers(1, 70)
seeds = st.integers(0, 2**31)
forms = st.sampled_from([Int8, Fp8])


def numbers(rows: int, columns: int, seed: int, spread: int) -> Tensor:
    """Normal numbers times powers of two down to 2^-spread, with some rows and columns of zeros."""
    torch.manual_seed(seed)
    out = torch.randn(rows, columns) * 2.0 ** -torch.randint(0, spread + 1, (rows, columns))
    return out * (torch.rand(rows, 1) > 0.1) * (torch.rand(columns) > 0.1)


@fast
@given(outputs=sides, inputs=sides, seed=seeds, spread=st.integers(0, 20))
def test_int8_is_off_by_half_a_step_at_most(outputs: int, inputs: int, seed: int, spread: int) -> None:
    """4 roundings in fp32, of 1/max, of that times 127, times w, and of max/127; each of a number of up to 127 steps."""
    weight = numbers(outputs, inputs, seed, spread)
    form = made(Int8, weight)
    step = form.scale[:, None].double()
    assert ((weight - step * form.codes).abs() <= step * (0.5 + 127 * 4 * FP32)).all()
    assert form.codes.min() >= -127
    assert not form.codes[weight == 0].any()


@fast
@given(outputs=sides, inputs=sides, seed=seeds, spread=st.integers(0, 20))
def test_fp8_is_off_by_a_sixteenth_or_half_a_subnormal_step(outputs: int, inputs: int, seed: int, spread: int) -> None:
    """2⁻¹⁷: the same four roundings, less than 5·2⁻²⁴ of a number, beside a bound that is at least 2⁻⁴ of it."""
    weight = numbers(outputs, inputs, seed, spread)
    form = made(Fp8, weight)
    step = form.scale[:, None].double()
    bound = (weight.abs().double() * 2**-4).maximum(step * 2**-10) * (1 + 2**-17)
    assert ((weight - step * form.codes.double()).abs() <= bound).all()
    assert form.codes.float().isfinite().all()


@fast
@given(
    form=forms,
    rows=sides,
    inputs=sides,
    outputs=sides,
    seed=seeds,
    spread=st.integers(0, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_bias=st.booleans(),
)
def test_products_are_those_of_the_quantised_numbers(
    form: type[Int8] | type[Fp8],
    rows: int,
    inputs: int,
    outputs: int,
    seed: int,
    spread: int,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    """Against float64. Roundings before the last: of the sum (one, exact in int32; n in fp32), two scales, a bias."""
    weight, x = numbers(outputs, inputs, seed, spread), numbers(rows, inputs, seed + 1, spread).to(dtype)
    grad, bias = numbers(rows, outputs, seed + 2, spread).to(dtype), torch.randn(outputs).to(dtype)
    made_form = made(form, weight, dtype)
    given_bias = bias if with_bias else None
    forward, back = made_form.multiply(x, given_bias), made_form.multiply_back(grad)
    checks = (
        (forward, emulated(made_form, x, bias=given_bias), inputs),
        (back, emulated(made_form, grad, back=True), outputs),
    )
    for out, (truth, magnitudes), terms in checks:
        fp32 = ((1 if form is Int8 else terms) + 3) * FP32 * (magnitudes + truth.abs())
        assert ((out.double() - truth).abs() <= fp32 + UNIT[dtype] * (truth.abs() + fp32)).all()
