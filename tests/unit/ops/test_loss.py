"""The loss from hidden states: torch's cross-entropy, without its logits."""

import pytest
import torch
from models import error
from torch import Tensor
from torch.nn import functional as F

from lamina.ops import loss
from lamina.ops.loss import IGNORED, SLICE, cross_entropy_sum, token_scores

MASKS = {
    "answers": lambda rows: torch.arange(rows) % 3 == 0,
    "all": lambda rows: torch.ones(rows, dtype=torch.bool),
    "none": lambda rows: torch.zeros(rows, dtype=torch.bool),
    "last": lambda rows: torch.arange(rows) == rows - 1,
}


def case(rows: int, mask: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [rows, 12], a vocabulary [37, 12], targets."""
    torch.manual_seed(rows)
    targets = torch.randint(37, (rows,)).where(MASKS[mask](rows), IGNORED)
    return torch.randn(rows, 12, dtype=dtype), torch.randn(37, 12, dtype=dtype), targets


@pytest.mark.parametrize("mask", ["answers", "all", "none", "last"])
@pytest.mark.parametrize("rows", [1, 511, 512, 513, 3 * SLICE + 1])
def test_sum_count_and_gradient_are_those_of_torch(rows: int, mask: str) -> None:
    """In float64: 1e-12 is 4,500 ε, for sums of up to 1,537 rows whose terms are a few nats each."""
    hidden, vocabulary, targets = case(rows, mask)
    reference = hidden.clone().requires_grad_()
    expected = F.cross_entropy(reference @ vocabulary.t(), targets, reduction="sum", ignore_index=IGNORED)
    hidden.requires_grad_()
    total, count = cross_entropy_sum(hidden, vocabulary, targets)
    (3.0 * expected).backward()
    (3.0 * total).backward()
    assert count == int((targets != IGNORED).sum())
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(hidden.grad, reference.grad, rtol=1e-12, atol=1e-12)


def test_gradient_by_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SLICE", 4)
    hidden, vocabulary, targets = case(11, "answers")
    assert torch.autograd.gradcheck(lambda h: cross_entropy_sum(h, vocabulary, targets)[0], hidden.requires_grad_())


def test_slices_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, vocabulary, targets = case(100, "all", torch.float32)
    found = []
    for rows in (7, 100):
        monkeypatch.setattr(loss, "SLICE", rows)
        leaf = hidden.clone().requires_grad_()
        cross_entropy_sum(leaf, vocabulary, targets)[0].backward()
        found.append(leaf.grad)
    # Each row has its own GEMM row of 12 + 37 products: a few ε of 1.2e-7, on gradients of about 1.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_in_evaluation_no_gradient_is_computed() -> None:
    hidden, vocabulary, targets = case(20, "all")
    total, _ = cross_entropy_sum(hidden, vocabulary, targets)
    assert not total.requires_grad


def test_vocabulary_is_frozen() -> None:
    hidden, vocabulary, targets = case(20, "all")
    vocabulary.requires_grad_()
    cross_entropy_sum(hidden.requires_grad_(), vocabulary, targets)[0].backward()
    assert vocabulary.grad is None


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    vocabulary = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.0, 1.0]])
    total, _ = cross_entropy_sum(hidden, vocabulary, torch.tensor([1]))
    total.backward()
    assert total.item() == 200_000.0
    assert torch.equal(hidden.grad, torch.tensor([[200.0, 0.0]]))


def test_unsupervised_rows_are_not_read() -> None:
    hidden, vocabulary, targets = case(20, "answers")
    hidden[targets == IGNORED] = float("nan")
    total, _ = cross_entropy_sum(hidden.requires_grad_(), vocabulary, targets)
    total.backward()
    assert total.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()
    assert not hidden.grad[targets == IGNORED].any()


def test_bf16_error_is_at_most_that_of_plain_torch() -> None:
    """1.2: the rule of the house for two orders of rounding in the same precision."""
    hidden, vocabulary, targets = case(1000, "all", torch.bfloat16)

    def plain(h: Tensor, v: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, v).to(torch.promote_types(h.dtype, torch.float32)), targets, reduction="sum")

    runs = {}
    for name, op, cast in (
        ("truth", plain, torch.float64),
        ("plain", plain, torch.bfloat16),
        ("ours", lambda h, v: cross_entropy_sum(h, v, targets)[0], torch.bfloat16),
    ):
        leaf = hidden.to(cast).requires_grad_()
        total = op(leaf, vocabulary.to(cast))
        total.backward()
        runs[name] = (total.detach(), leaf.grad)
    assert runs["ours"][0].dtype == torch.float32
    truth, reference, ours = runs["truth"], runs["plain"], runs["ours"]
    # The sum is one number, and its error a matter of luck: allow what rounding each logit to bf16 may cost at random,
    # √1000 rows · |logit| ~ 3.5 · 2⁻⁹.
    assert abs(ours[0].double() - truth[0]) <= 1.2 * abs(reference[0].double() - truth[0]) + 1000**0.5 * 3.5 * 2**-9
    assert error(ours[1], truth[1]) <= 1.2 * error(reference[1], truth[1])


@pytest.mark.parametrize("rows", [1, SLICE, SLICE + 1])
@pytest.mark.parametrize("mask", ["answers", "none"])
def test_token_scores(rows: int, mask: str) -> None:
    hidden, vocabulary, targets = case(rows, mask, torch.float32)
    losses, correct = token_scores(hidden, vocabulary, targets)
    supervised = targets != IGNORED
    expected = F.cross_entropy((hidden @ vocabulary.t())[supervised], targets[supervised], reduction="none")
    assert losses.dtype == torch.float32
    # Logits of 12 products each, summed in another order: |logit| ~ 15, ε = 1.2e-7, a dozen roundings.
    torch.testing.assert_close(losses, expected, rtol=0, atol=2e-5)
    assert torch.equal(correct, ((hidden @ vocabulary.t()).argmax(1) == targets)[supervised])


@pytest.mark.parametrize("rows", [1, 5, 512])
def test_chunks_of_rows_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Rows are normalised each by itself, on a CPU and on any other device."""
    hidden, vocabulary, targets = case(600, "answers", torch.float32)
    found = []
    for chunk in (loss.CHUNK["cpu"], rows):
        monkeypatch.setitem(loss.CHUNK, "cpu", chunk)
        leaf = hidden.clone().requires_grad_()
        total, _ = cross_entropy_sum(leaf, vocabulary, targets)
        total.backward()
        found.append((total, leaf.grad, *token_scores(hidden, vocabulary, targets)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_fp32_error_is_that_of_the_formula() -> None:
    """The error of exp(logit - logsumexp) is at most (|logit - logsumexp| + 3)·ε per probability; the softmax's 3·ε.

    Both vanish beside the GEMMs' own, so the two agree in their distance to the truth.
    """
    hidden, vocabulary, targets = case(1000, "all", torch.float32)
    truth = hidden.double() @ vocabulary.double().t()
    expected = truth.softmax(1).scatter_add(1, targets[:, None], truth.new_full((1000, 1), -1.0)) @ vocabulary.double()
    logits = hidden @ vocabulary.t()
    formula = (logits - logits.logsumexp(1, keepdim=True)).exp()
    formula = formula.scatter_add(1, targets[:, None], formula.new_full((1000, 1), -1.0)) @ vocabulary
    leaf = hidden.requires_grad_()
    cross_entropy_sum(leaf, vocabulary, targets)[0].backward()
    assert leaf.grad is not None
    assert error(leaf.grad, expected) <= 1.2 * error(formula, expected)


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 33, 48, 1000])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_bf16_logits_of_any_number(vocabulary: int, scale: float) -> None:
    """The kernel alone: hidden states that are unit vectors make the vocabulary's columns the logits. Rounded once: half an ε."""
    torch.manual_seed(vocabulary)
    logits = (torch.randn(16, vocabulary) * scale).bfloat16()
    targets = torch.randint(vocabulary, (16,))
    hidden = torch.eye(16).bfloat16().requires_grad_()
    total, _ = cross_entropy_sum(hidden, logits.t().contiguous(), targets)
    truth = logits.double().requires_grad_()
    expected = F.cross_entropy(truth, targets, reduction="sum")
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    total.backward()
    expected.backward()
    # grad·vocabulary, of gradients that were rounded once to bf16, summed over the vocabulary in fp32 and rounded again.
    reference = truth.grad @ logits.double().t()
    torch.testing.assert_close(hidden.grad.double(), reference, rtol=0.02, atol=0.02 * scale * vocabulary**0.5)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        vocabulary = torch.ones(20, 4).to(dtype)
        vocabulary[17] = value
        hidden = torch.ones(2, 4).to(dtype).requires_grad_()
        total, _ = cross_entropy_sum(hidden, vocabulary, torch.tensor([17, 3]))
        assert not total.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [-1, 37, 50_000])
def test_a_target_outside_the_vocabulary_is_refused(target: int, dtype: torch.dtype) -> None:
    hidden, vocabulary, targets = case(20, "all", dtype)
    targets[3] = target
    with pytest.raises((IndexError, RuntimeError), match="expected 0|out of bounds"):
        cross_entropy_sum(hidden, vocabulary, targets)


def test_targets_that_are_every_other_number() -> None:
    hidden, vocabulary, targets = case(20, "all", torch.bfloat16)
    spread = targets.repeat_interleave(2)[::2]
    assert not spread.is_contiguous()
    assert torch.equal(
        cross_entropy_sum(hidden, vocabulary, spread)[0], cross_entropy_sum(hidden, vocabulary, targets)[0]
    )
