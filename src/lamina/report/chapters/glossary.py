"""The words of the page, for readers who have not met them."""

from lamina.report.kept import Kept
from lamina.report.page import Page, Sayings

WORDS = (
    ("token", "A word or a piece of one: what the model reads and writes, one after the other."),
    ("held-out rows", "Rows of the data that were kept from training, to see what was learnt and not only remembered."),
    ("loss", "How surprised the model was by the right next token: −log p, in nats. Of several tokens it is the mean."),
    ("perplexity", "e to the loss: among about how many equally likely tokens the model hesitates. 1 is certainty."),
    ("neutral text", "Text that has nothing to do with the task. What its loss rises by was forgotten."),
    (
        "KL divergence",
        "How far the adapter's predictions are from the base's, in nats per token, whichever of them is right; 0 if they are equal.",
    ),
    (
        "ΔW, rank",
        "The adapter changes a matrix W of the base by ΔW, a product of two thin matrices B and A. Their common side is the rank: at "
        "most so many directions are changed. The effective rank says among how many the change is evenly spread.",
    ),
    ("‖ΔW‖", "The size of a matrix (Frobenius): the root of the sum of the squares of its numbers."),
    (
        "q_proj … down_proj",
        "The matrices of a layer: four of attention (q, k, v, o), three of the MLP (gate, up, down).",
    ),
    (
        "95\u00a0% interval",
        "Other held-out rows would have given other numbers; 95 of 100 such intervals hold the true one.",
    ),
)


def glossary(page: Page, kept: Kept) -> None:
    """Adds the last chapter; it is the same for every run."""
    page.section("The words").add(Sayings(WORDS))
