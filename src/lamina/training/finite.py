"""Training stops at the first number that is not finite, and at matrices that cannot learn, and says where they are."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lamina.adapter import adapted
from lamina.data.pack import Batch
from lamina.errors import TrainingError
from lamina.model.decoder import Decoder
from lamina.model.quantised import QuantisedLinear
from lamina.ops.attention import Packed
from lamina.ops.loss import token_scores

LOWER = "start a new run, in another --out, with a lower learning rate"
"""What helps where the steps are too large; a resumed run keeps its rate."""


def refuse_non_finite(model: Decoder, loss: Tensor, norm: Tensor, batches: Sequence[Batch], step: int) -> None:
    """Passes when the step's loss and gradient norm are finite: one read of the device.

    Raises:
        TrainingError: names step, layer and rows, or the base's own weights where they are to blame. They are found by
            computing the step again, which is safe: the optimiser has not moved.
    """
    if torch.isfinite(loss + norm).item():
        return
    what = "gradient" if torch.isfinite(loss) else "loss"
    layer, rows = _first_bad_layer(model, batches), list(_bad_rows(model, batches))
    if layer is None and what == "loss":
        layer = "the head"
    elif layer is None:  # the backward pass goes from the last layer to the first
        backwards = reversed(adapted(model).items())
        bad = (path for path, m in backwards if any(not finite(p.grad) for p in (m.a, m.b)))
        layer = next(bad, "the sum over the gradients")
    rows = sorted({*rows} or {row for batch in batches for row in batch.rows})
    advice = damage(model) or f"{LOWER}, or look at these rows"
    raise TrainingError(
        f"step {step}: the {what} is not finite; first in {layer}, rows {', '.join(map(str, rows[:8]))}"
        f"{' …' if len(rows) > 8 else ''}; the adapter is as it was before this step; {advice}"
    )


def damage(model: Decoder) -> str:
    """Says which frozen weights are not finite; nothing where all are."""
    bad = [name for name, weight in model.named_parameters() if not weight.requires_grad and not finite(weight)]
    quantised = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantisedLinear))
    bad += [name for name, module in quantised if not finite(module.form.dense())]
    if not bad:
        return ""
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"the base itself is damaged, with non-finite numbers in {bad[0]}{more}: get it anew"


def refuse_broken_adapter(model: Decoder, step: int) -> None:
    """Passes when the update of a step left every A and B finite: one read of the device.

    Raises:
        TrainingError: names the step; what was saved before it is untouched.
    """
    parameters = [parameter for module in adapted(model).values() for parameter in module.parameters(recurse=False)]
    if not torch.isfinite(nn.utils.get_total_norm(parameters)).item():
        raise TrainingError(
            f"step {step}: its update made the adapter non-finite; nothing of it is saved, what was saved before is as it "
            f"was; {LOWER}"
        )


def refuse_silent(model: Decoder) -> None:
    """Passes when every B has a gradient. A has none yet in the first step, because B is zero.

    Raises:
        TrainingError: lists the modules whose B has none, and would never learn.
    """
    modules = adapted(model)
    silent = [path for path, module in modules.items() if module.b.grad is None or not module.b.grad.any()]
    if silent:
        raise TrainingError(
            f"after the first step {len(silent)} of {len(modules)} adapted matrices have no gradient and would learn "
            f"nothing: {', '.join(silent[:8])}{' …' if len(silent) > 8 else ''}; leave them out of adapter.targets, or "
            f"see whether the base feeds them zeros"
        )


def finite(tensor: Tensor | None) -> bool:
    """Whether all numbers of a tensor are finite; no tensor has none that is not."""
    return tensor is None or bool(torch.isfinite(tensor).all())


@torch.no_grad()
def _first_bad_layer(model: Decoder, batches: Sequence[Batch]) -> str | None:
    """The first module, in the order of the computation, whose output is not finite on one of the batches."""
    bad: list[str] = []

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, __: object, output: Tensor) -> None:
            if not bad and not finite(output):
                bad.append(name)

        return model.get_submodule(name).register_forward_hook(look)

    leaves = [
        n for n, m in model.named_modules() if n != "lm_head" and not isinstance(m, nn.ModuleList) and n.count(".") > 0
    ]
    handles = [watch(name) for name in leaves]
    for batch in batches:
        _hidden(model, batch)
    for handle in handles:
        handle.remove()
    return bad[0] if bad else None


@torch.no_grad()
def _bad_rows(model: Decoder, batches: Sequence[Batch]) -> Iterator[int]:
    for batch in batches:
        hidden, targets = _hidden(model, batch), batch.targets.to(model.vocabulary.device)
        for row, part, target in zip(
            batch.rows, hidden.split(batch.lengths), targets.split(batch.lengths), strict=True
        ):
            if not finite(token_scores(part, model.vocabulary, target)[0]):
                yield row


def _hidden(model: Decoder, batch: Batch) -> Tensor:
    device = model.vocabulary.device
    hidden: Tensor = model(batch.tokens.to(device), batch.position.to(device), Packed(batch.lengths))
    return hidden
