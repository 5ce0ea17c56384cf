import pytest

from lamina.data.examples import DataSettings
from lamina.errors import ConfigError


def test_settings_are_checked() -> None:
    with pytest.raises(
        ConfigError, match="eval_fraction: found 1.0, expected .*; long: found 'cut', expected one of drop"
    ):
        DataSettings(data="d", eval_fraction=1.0, long="cut")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "^data: found nothing, expected text of at least one character$"),
        ({"data": ""}, "^data: found '', expected text of at least one character$"),
        ({"data": "d", "eval_data": ""}, "^eval_data: found '', expected text of at least one character or none$"),
    ],
)
def test_data_must_be_named(given: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DataSettings(**given)
