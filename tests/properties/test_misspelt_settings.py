"""Any misspelt setting is refused, in a file as on the command line, and its nearest name is told."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lamina import jobfile
from lamina.cli import Parser
from lamina.errors import ConfigError
from lamina.job import SECTIONS
from lamina.settings import Setting, add_flags, read_toml, settings

WHOLE = {"": jobfile.Head, **SECTIONS}
ALL = list(settings(WHOLE))
NAMES = {setting.name for setting in ALL}


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[Setting, str]:
    """A setting, and its name with one letter doubled, left out, or exchanged with the next."""
    setting = draw(st.sampled_from(ALL))
    name = setting.name
    at = draw(st.integers(0, len(name) - 2))
    wrong = draw(
        st.sampled_from(
            [
                name[:at] + name[at] + name[at:],
                name[:at] + name[at + 1 :],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            ]
        )
    )
    assume(wrong not in NAMES and wrong not in WHOLE and wrong.isidentifier() and not wrong.startswith("_"))
    return setting, wrong


@given(misspelt())
def test_a_misspelt_key_is_refused(case: tuple[Setting, str]) -> None:
    setting, wrong = case
    tables = {setting.section: {wrong: 1}} if setting.section else {wrong: 1}
    with pytest.raises(ConfigError, match=f"^job.toml: (\\[{setting.section}\\] )?{wrong}: is no setting"):
        read_toml(tables, WHOLE, "job.toml")


@given(misspelt())
def test_a_misspelt_flag_is_refused(case: tuple[Setting, str]) -> None:
    parser = Parser(prog="lamina train")
    add_flags(parser, WHOLE)
    flag = "--" + case[1].replace("_", "-")
    assume(flag not in [option for action in parser._actions for option in action.option_strings])
    with pytest.raises(ConfigError, match=f"^found flag '{flag}', which is unknown; did you mean --"):
        parser.parse([flag, "1"])
