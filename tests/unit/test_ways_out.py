"""Ways out of too little memory: the cheapest for the result first, several together where one is not enough."""

from lamina.adapter import LoRA
from lamina.data.examples import DataSettings
from lamina.job import Job
from lamina.model.weights import ModelSettings
from lamina.ways_out import Way, ways_out

JOB = Job(ModelSettings(model="m"), DataSettings(data="d"), LoRA(rank=64))


def needed(way: Way) -> int:
    """Bytes that fall by a part for each change."""
    changed = way.of(JOB)
    size = 100 if changed.model.base is None else 60
    size -= 5 * (changed.train.optimizer == "adamw8bit") + 10 * (changed.adapter.rank == 8)
    return size - (0 if way.longest is None else 10)


def test_the_first_three_that_fit_by_themselves() -> None:
    found = ways_out(JOB, 512, needed, 95)
    assert found == (("--optimizer adamw8bit", 95), ("--base nf4", 60), ("--max-length 256", 90))


def test_several_together_where_none_is_enough() -> None:
    assert ways_out(JOB, 512, needed, 46) == (("--optimizer adamw8bit --base nf4 --max-length 256", 45),)
    assert ways_out(JOB, 512, needed, 10) == ()
