"""Settings from files and flags and back, for sections that no module of Lamina knows."""

import argparse
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lamina.errors import ConfigError
from lamina.section import section
from lamina.settings import add_flags, build, parse_toml, read_flags, read_toml, write_toml

Positive = Annotated[int, Field(ge=1)]


@section
class Top:
    """The keys at the top."""

    seed: int = 0
    """The seed."""


@section
class Layers:
    """What is laid on, 100 % of it."""

    rank: Positive = 16
    """Rank of the update."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that is zeroed."""
    targets: tuple[str, ...] = ("all-linear",)
    """Where."""
    pattern: dict[str, Positive] = Field(default_factory=dict)
    """Other ranks."""
    stable: bool = False
    """Whether it is stabilised."""


@section
class Steps:
    """How it goes."""

    rate: Annotated[float, Field(gt=0)] | None = None
    """The rate; none takes the rule of thumb."""
    max_length: Positive | None = 2048
    """Longest example; none knows no limit."""
    schedule: Literal["constant", "linear"] = "constant"
    """Course of the rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moments."""
    template: str | None = None
    """A template."""

    def __post_init__(self) -> None:
        if self.template == "contradiction":
            raise ConfigError("found a contradiction, expected sense")
        if self.template == "nonsense":
            raise ValueError("found nonsense, expected sense")


SECTIONS: dict[str, type] = {"": Top, "layers": Layers, "steps": Steps}


def from_toml(text: str) -> dict[str, Any]:
    return build(SECTIONS, read_toml(parse_toml(text.encode(), "job.toml"), SECTIONS, "job.toml"))


def from_flags(*arguments: str, toml: str = "") -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, SECTIONS)
    file = read_toml(parse_toml(toml.encode(), "job.toml"), SECTIONS, "job.toml")
    return build(SECTIONS, file, read_flags(parser.parse_args(arguments), SECTIONS))


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_toml(text)
    return str(caught.value)


# Any text that TOML can carry: it is Unicode without lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
MADE = st.fixed_dictionaries(
    {
        "": st.builds(Top, seed=st.integers(-(2**63), 2**63 - 1)),
        "layers": st.builds(
            Layers,
            rank=st.integers(1, 2**40),
            dropout=st.floats(0, 1, exclude_max=True),
            targets=st.lists(TEXT, max_size=4).map(tuple),
            pattern=st.dictionaries(TEXT, st.integers(1, 99), max_size=4),
            stable=st.booleans(),
        ),
        "steps": st.builds(
            Steps,
            rate=st.none() | st.floats(1e-300, 1e300),
            max_length=st.none() | st.integers(1, 10**6),
            schedule=st.sampled_from(["constant", "linear"]),
            betas=st.tuples(NUMBER, NUMBER),
            template=st.none() | TEXT.filter(lambda text: text not in ("contradiction", "nonsense")),
        ),
    }
).map(lambda made: {section: made[section] for section in SECTIONS})


@given(MADE)
def test_settings_to_toml_to_settings_is_the_identity(made: dict[str, Any]) -> None:
    text = write_toml(made)
    assert from_toml(text) == made
    assert write_toml(from_toml(text)) == text


def test_a_written_file_names_and_documents_every_setting() -> None:
    assert write_toml({"": Top(), "steps": Steps(max_length=None)}) == (
        "# The seed. (an integer; default 0)\nseed = 0\n\n"
        "# How it goes.\n[steps]\n\n"
        '# The rate; none takes the rule of thumb. (a number > 0 or none; default none)\n# rate = "none"\n\n'
        '# Longest example; none knows no limit. (an integer ≥ 1 or none; default 2048)\nmax_length = "none"\n\n'
        '# Course of the rate. (one of constant, linear; default "constant")\nschedule = "constant"\n\n'
        "# Decay of the moments. (a list of 2 numbers; default [0.9, 0.95])\nbetas = [0.9, 0.95]\n\n"
        '# A template. (text or none; default none)\n# template = "none"\n'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[layers]\nrank = 0", "job.toml: [layers] rank: found 0, expected an integer ≥ 1"),
        ("seed = 'x'", "job.toml: seed: found 'x', expected an integer"),
        (
            "[layers]\nrnak = 8",
            "job.toml: [layers] rnak: is no setting; did you mean rank? (known: dropout, pattern, rank, stable, targets)",
        ),
        ("[layers]\nrate = 1e-4", "job.toml: [layers] rate: belongs under [steps]"),
        ("rank = 8", "job.toml: rank: belongs under [layers]"),
        ("[layers]\nseed = 1", "job.toml: [layers] seed: belongs at the top of the file, before the first section"),
        ("sed = 8", "job.toml: sed: is no setting; did you mean seed? (known: seed)"),
        ("[layer]\nrank = 8", "job.toml: [layer]: is no section; did you mean layers? (known: layers, steps)"),
        ("layers = 3", "job.toml: layers: found 3, expected a table [layers]"),
        ("layers = [true]", "job.toml: layers: found [true], expected a table [layers]"),
        ("[layers]\nrank = [1]", "job.toml: [layers] rank: found [1], expected an integer ≥ 1"),
        ("[layers]\nrank = {a = 1, 'b c' = 'x'}", "job.toml: [layers] rank: found {a = 1, 'b c' = 'x'}, expected an"),
        ("seed = 2024-01-01T10:00:00Z", "job.toml: seed: found 2024-01-01T10:00:00+00:00, expected an integer"),
        ("[steps]\n[steps]\n", "job.toml:2: found broken TOML (Cannot declare [steps] twice), expected lines such as"),
        ("[a.'b c']\n[a.'b c']\n", "job.toml:2: found broken TOML (Cannot declare [a.b c] twice), expected lines"),
        (
            "[layers]\nrank = 'a'\n[steps]\nbetas = 1\n",
            "job.toml: [layers] rank: found 'a', expected an integer ≥ 1; job.toml: [steps] betas: found 1, expected a",
        ),
        (
            "[steps]\nrate = 2024-01-01",
            "job.toml: [steps] rate: found 2024-01-01, expected a number > 0",
        ),
        (
            "seed = 1\nrank 8\n",
            "job.toml:2: found broken TOML (Expected '=' after a key in a key/value pair), expected",
        ),
        ("seed = 1\nx = [1,\n", "job.toml:3: found broken TOML (Invalid value), expected lines such as: rank = 16"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(text: str, message: str) -> None:
    assert refused(text).startswith(message)


def test_a_file_that_is_not_utf8_is_refused_with_the_line() -> None:
    with pytest.raises(ConfigError, match="^job.toml:2: found the byte 0xe9, expected UTF-8 text$"):
        parse_toml("seed = 1\n# caf\u00e9".encode("latin-1"), "job.toml")


def test_a_mark_that_windows_writes_at_the_beginning_is_no_fault() -> None:
    assert parse_toml("seed = 1\n".encode("utf-8-sig"), "job.toml") == {"seed": 1}
    with pytest.raises(ConfigError, match="^job.toml:2: found the byte 0xe9, expected UTF-8 text$"):
        parse_toml(b"\xef\xbb\xbfseed = 1\n# caf\xe9", "job.toml")


def test_flags_win_over_the_file_and_the_file_over_the_defaults() -> None:
    made = from_flags("--rank", "4", toml="seed = 3\n[layers]\nrank = 8\ndropout = 0.1\n")
    assert (made[""].seed, made["layers"]) == (3, Layers(rank=4, dropout=0.1))


@pytest.mark.parametrize(
    ("arguments", "section_name", "name", "value"),
    [
        (["--rank", "4"], "layers", "rank", 4),
        (["--dropout=.5"], "layers", "dropout", 0.5),
        (["--targets", "q_proj, v_proj"], "layers", "targets", ("q_proj", "v_proj")),
        (["--targets", r"\d{1,2}\.q,[k,v]_proj,(a,b)c"], "layers", "targets", (r"\d{1,2}\.q", "[k,v]_proj", "(a,b)c")),
        (["--targets", "q_proj"], "layers", "targets", ("q_proj",)),
        (["--pattern", "q_proj=8,(k|v)_proj=4"], "layers", "pattern", {"q_proj": 8, "(k|v)_proj": 4}),
        (["--pattern", r"layers\.\d{1,2}\.q=8"], "layers", "pattern", {r"layers\.\d{1,2}\.q": 8}),
        (["--stable"], "layers", "stable", True),
        (["--no-stable"], "layers", "stable", False),
        (["--rate", "1e-4"], "steps", "rate", 1e-4),
        (["--rate", "none"], "steps", "rate", None),
        (["--max-length", "none"], "steps", "max_length", None),
        (["--betas", "0.5,0.9"], "steps", "betas", (0.5, 0.9)),
        (["--template", "a,b"], "steps", "template", "a,b"),
        (["--seed=-1"], "", "seed", -1),
    ],
)
def test_a_flag_is_parsed_by_the_type_of_its_field(
    arguments: list[str], section_name: str, name: str, value: object
) -> None:
    toml = "[layers]\nstable = true\n[steps]\nrate = 1.0"  # so that --no-stable and none have something to undo
    assert getattr(from_flags(*arguments, toml=toml)[section_name], name) == value


def test_wrong_values_of_flags_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        from_flags("--rank", "0", "--pattern", "q_proj=8,junk", "--betas", "1", "--schedule", "cosin")
    assert str(caught.value) == (
        "--rank: found '0', expected an integer ≥ 1; "
        "--pattern: found 'q_proj=8,junk', expected a table of integers ≥ 1; "
        "--schedule: found 'cosin', expected one of constant, linear; "
        "--betas: found '1', expected a list of 2 numbers"
    )


@section
class Texts:
    """Texts of a form."""

    layers: Annotated[str, Field(pattern="^[0-9]+$")] | None = None
    """Layers."""
    data: Annotated[str, Field(min_length=1)] = "d"
    """Data."""


def test_a_flag_that_misses_its_pattern_names_it() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, {"texts": Texts})
    with pytest.raises(ConfigError) as caught:
        read_flags(parser.parse_args(["--layers", "abc", "--data", ""]), {"texts": Texts})
    assert str(caught.value) == (
        "--layers: found 'abc', expected text that matches ^[0-9]+$; --data: found '', expected text of at least one character"
    )


def test_text_that_no_file_can_hold_is_told_as_such() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, {"texts": Texts})
    with pytest.raises(ConfigError) as caught:
        read_flags(parser.parse_args(["--data", "data/l\udce9.jsonl"]), {"texts": Texts})
    assert str(caught.value) == r"--data: found 'data/l\udce9.jsonl', expected UTF-8 text"
    with pytest.raises(ConfigError, match="^data: found .*, expected UTF-8 text$"):
        Texts(data="data/l\udce9.jsonl")


def test_what_only_the_section_refuses_names_the_flag_too() -> None:
    with pytest.raises(ConfigError, match="^--betas: found \\[nan, nan\\], expected a list of 2 numbers$"):
        from_flags("--betas", "nan,nan")


@section
class Needs:
    """What has no default."""

    model: str
    """A model."""


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match=r"^\[needs\] model: found nothing, expected text$"):
        build({"needs": Needs})
    assert '# A model. (text; no default)\nmodel = "m"' in write_toml({"needs": Needs(model="m")})


def test_what_cannot_be_seen_is_escaped_and_read_back() -> None:
    made = Needs(model="\x7f\x9b\u202e\u2028\U000e0001é✓")
    text = write_toml({"needs": made})
    assert 'model = "\\u007f\\u009b\\u202e\\u2028\\U000e0001é✓"' in text
    assert build({"needs": Needs}, read_toml(parse_toml(text.encode(), "f"), {"needs": Needs}, "f")) == {"needs": made}


@pytest.mark.parametrize("found", ["a contradiction", "nonsense"])
def test_what_the_section_refuses_as_a_whole_names_the_section(found: str) -> None:
    assert refused(f"[steps]\ntemplate = '{found.split()[-1]}'") == f"[steps]: found {found}, expected sense"


def test_help_holds_documentation_range_and_default() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, SECTIONS)
    text = " ".join(parser.format_help().split())
    assert "--rank N Rank of the update. (an integer ≥ 1; default 16)" in text
    assert "--stable, --no-stable" in text
    assert "What is laid on, 100 % of it." in text
