"""The tests check the annotations of the package: types everywhere, shapes where they are annotated."""

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from checked import checked, with_shapes
from models import tiny
from torch import Tensor

from lamina.adapter import LoRA, adapted, attach
from lamina.ops.loss import paired_scores
from lamina.ops.shapes import Float
from lamina.report.charts import Line
from lamina.report.drawing import canvas, written


def test_types_are_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"):
        written("three")  # type: ignore[arg-type]
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"), canvas("high"):  # type: ignore[arg-type]
        pass
    assert written(3) == "3", "an int may stand for a float"


def test_fields_and_methods_are_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"):
        Line("loss", [0.0, 1.0], "falls steeply")  # type: ignore[arg-type]
    model = tiny()
    attach(model, LoRA(rank=1))
    module = next(iter(adapted(model).values()))
    with pytest.raises(BeartypeCallHintViolation, match="violates type hint"):
        module.forward([1.0])


def test_shapes_are_checked() -> None:
    x, weight, targets = torch.randn(5, 4), torch.randn(9, 4), torch.zeros(5, dtype=torch.int64)
    paired_scores(x, x, weight, targets)
    with pytest.raises(BeartypeCallHintViolation, match=r"(?s)paired_scores.* vocabulary=.*dimension D is 3"):
        paired_scores(x, x, torch.randn(9, 3), targets)


def test_a_letter_is_one_number_in_a_call_and_free_in_the_next() -> None:
    @checked(typechecker=beartype)
    def narrowed(x: Float[Tensor, "N D"], by: int) -> Float[Tensor, "N D"]:
        return x[:, by:] if by < 2 else narrowed(x[:, 1:], 0)

    assert narrowed(torch.zeros(2, 3), 0).shape == (2, 3)
    assert narrowed(torch.zeros(4, 5), 0).shape == (4, 5)
    for by in (1, 2):
        with pytest.raises(BeartypeCallHintViolation, match="(?s)narrowed.. return .*dimension D is"):
            narrowed(torch.zeros(2, 3), by)


def test_the_modules_that_annotate_shapes_are_found() -> None:
    assert {"lamina.ops.loss", "lamina.ops.attention", "lamina.model.decoder"} <= set(with_shapes())
    assert "lamina.report.drawing" not in with_shapes()
