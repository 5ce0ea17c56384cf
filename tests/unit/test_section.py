"""A section is checked strictly, and tells everything that is wrong at once."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from lamina.errors import ConfigError
from lamina.section import SectionError, expected, section


@section
class Sample:
    """A section with a field of every kind."""

    rank: Annotated[int, Field(ge=1)] = 16
    """The rank."""
    rate: Annotated[float, Field(gt=0)] | None = None
    """The rate; none takes the rule of thumb."""
    targets: str | tuple[str, ...] = "all-linear"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    schedule: Literal["constant", "linear"] = "constant"
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    layers: Annotated[str, Field(pattern="^(all|[0-9]+)$")] = "all"
    loud: bool = False

    def __post_init__(self) -> None:
        if self.rank == 13:
            raise ConfigError("rank 13 contradicts superstition")
        if self.rank == 17:
            raise ValueError("found rank 17, expected another")


def message(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        Sample(**values)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rank", 0, "rank: found 0, expected an integer ≥ 1"),
        ("rank", "8", "rank: found '8', expected an integer ≥ 1"),
        ("rank", 8.0, "rank: found 8.0, expected an integer ≥ 1"),
        ("rank", True, "rank: found true, expected an integer ≥ 1"),
        ("rank", None, "rank: found none, expected an integer ≥ 1"),
        ("rate", 0, "rate: found 0, expected a number > 0 or none"),
        ("rate", float("nan"), "rate: found nan, expected a number > 0 or none"),
        ("targets", 3, "targets: found 3, expected text or a list of texts"),
        ("betas", (0.9, 1.0), "betas: found [0.9, 1.0], expected a list of 2 numbers ≥ 0 and < 1"),
        ("pattern", {"q": 0}, "pattern: found {q = 0}, expected a table of integers ≥ 1"),
        ("schedule", "cosin", "schedule: found 'cosin', expected one of constant, linear"),
        ("share", 2, "share: found 2, expected a number ≥ 0 and ≤ 1"),
        ("layers", "top", "layers: found 'top', expected text that matches ^(all|[0-9]+)$"),
        ("loud", 1, "loud: found 1, expected true or false"),
        (
            "rnak",
            8,
            "rnak: is no setting; did you mean rank? (known: betas, layers, loud, pattern, rank, rate, schedule,",
        ),
    ],
)
def test_a_wrong_value_is_refused(name: str, value: object, text: str) -> None:
    assert message(**{name: value}).startswith(text)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(SectionError) as caught:
        Sample(rank=0, schedule="cosine", loud="yes")  # type: ignore[arg-type]
    assert list(caught.value.problems) == ["rank", "schedule", "loud"]


def test_contradictions_come_from_the_section_itself() -> None:
    assert message(rank=13) == "rank 13 contradicts superstition"
    assert message(rank=17) == "found rank 17, expected another"


def test_a_setting_without_default_must_be_given() -> None:
    @section
    class Needs:
        model: str

    with pytest.raises(ConfigError, match="^model: found nothing, expected text$"):
        Needs()  # type: ignore[call-arg]


def test_lists_become_tuples_integers_numbers_and_the_word_none_becomes_none() -> None:
    made = Sample(rate=1, targets=["q_proj", "v_proj"], betas=[0.5, 0])  # type: ignore[arg-type]
    assert (made.rate, made.targets, made.betas) == (1.0, ("q_proj", "v_proj"), (0.5, 0.0))
    assert isinstance(made.rate, float)
    assert Sample(rate="none").rate is None  # type: ignore[arg-type]
    assert Sample(targets="none").targets == "none"  # None is not allowed there, so the word is text


def test_a_section_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Sample().rank = 3  # type: ignore[misc]


def test_bounds_of_a_union_stand_before_none() -> None:
    assert expected(Annotated[float | None, Field(gt=0)]) == "a number > 0 or none"
    assert expected(Literal["bf16"]) == "bf16"
