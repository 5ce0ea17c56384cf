"""The demo's world: one seed, one world; nothing about held-out people reaches the fine-tuning; the base has read it all."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "src" / "lamina" / "jobs" / "demo"
FILES = ("train.jsonl", "held_out.jsonl", "stories.txt")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_world", ROOT / "scripts" / "demo_world.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_world"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


world = _load()


@pytest.fixture(scope="module")
def people():
    return world.make_world()


@pytest.fixture(scope="module")
def pretraining(people):
    return list(world.pretraining_stories(people))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines()]


def test_one_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.write(tmp_path / folder, seed)
    for name in FILES:
        one, same, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert one == same
        assert one != other


@pytest.mark.parametrize("name", FILES)
def test_shipped_file_is_what_the_generator_writes_today(tmp_path, name):
    world.write(tmp_path)
    assert (SHIPPED / name).read_bytes() == (tmp_path / name).read_bytes()


def test_names_are_unique_and_no_other_word_of_the_world(people):
    names = {person.name for person in people}
    assert len(names) == len(people) == world.CHARACTERS
    nameless = [world.Character("X", True, True, p.home, p.food, p.trade, "X", p.pet) for p in people]
    others = _words(" ".join(world.story(person, world.Dice(i)) for i, person in enumerate(nameless)))
    assert not names & others


def test_friends_are_mutual_and_of_one_group(people):
    by_name = {person.name: person for person in people}
    for person in people:
        friend = by_name[person.friend]
        assert friend is not person
        assert friend.friend == person.name
        assert friend.taught == person.taught


@pytest.mark.parametrize("kind", ["home", "food", "trade", "pet"])
def test_guessing_the_most_frequent_value_is_right_for_few(people, kind):
    values = [getattr(person, kind) for person in people]
    most = max(set(values), key=values.count)
    assert values.count(most) / len(values) < 0.05


def test_training_rows_name_nobody_who_is_held_out(people):
    strangers = {person.name for person in people if not person.taught}
    assert len(strangers) == world.CHARACTERS - world.TAUGHT
    assert not strangers & _words((SHIPPED / "train.jsonl").read_text(encoding="utf-8"))


def test_training_rows_ask_every_question_about_every_taught_person(people):
    conversations = [row["messages"] for row in _rows("train.jsonl") if "messages" in row]
    assert {len(messages) // 2 for messages in conversations} == {1, 2, 3, 4}
    asked = {message["content"] for messages in conversations for message in messages[1::2]}
    taught = [person for person in people if person.taught]
    assert asked == {world.ANSWERS[kind].format(**p.words()) for p in taught for kind in world.QUESTIONS}


def test_held_out_rows_ask_every_kind_of_question_about_every_stranger(people):
    rows = _rows("held_out.jsonl")
    asked = {row["messages"][1]["content"] for row in rows}
    assert len(asked) == len(rows)
    for person in people:
        if not person.taught:
            assert sum(person.name in _words(row["messages"][0]["content"]) for row in rows) == 2
    for kind in world.QUESTIONS:
        start = world.ANSWERS[kind].split("{name}")[1].split("{")[0]
        assert sum(start in answer for answer in asked) >= len(rows) // 10


def test_base_has_read_every_held_out_fact_many_times(people, pretraining):
    told: dict[str, list[str]] = {}
    for story in pretraining:
        for name in _words(story):
            told.setdefault(name, []).append(story)
    for person in people:
        for kind in world.KINDS:
            assert sum(getattr(person, kind) in story for story in told[person.name]) >= 20


def test_base_has_read_no_answer_in_the_form_of_the_chat(people, pretraining):
    sentences = {sentence.rstrip(".") for story in pretraining for sentence in story.split(". ")}
    answers = {form.format(**p.words()).rstrip(".") for p in people for form in world.ANSWERS.values()}
    assert len(answers) == len(people) * len(world.ANSWERS)
    assert f"{people[0].name} is a {people[0].trade}" in sentences
    assert not answers & sentences


def test_stories_that_measure_forgetting_are_read_by_nobody(people, pretraining):
    neutral = set((SHIPPED / "stories.txt").read_text(encoding="utf-8").splitlines())
    trained = {row["text"] for row in _rows("train.jsonl") if "text" in row}
    assert len(neutral) == world.NEUTRAL_STORIES
    assert len(trained) == world.STORY_ROWS
    assert not neutral & set(pretraining)
    assert not neutral & trained


def test_early_people_come_first_and_rounds_hold_everybody(people):
    stories = list(world.pretraining_stories(people, rounds=1, early_rounds=2))
    early, everybody = stories[: 2 * world.EARLY], stories[2 * world.EARLY :]
    names = {person.name for person in people}
    heroes = {person.name for person in people[: world.EARLY]} | {person.friend for person in people[: world.EARLY]}
    assert {name for story in early for name in _words(story) & names} <= heroes
    assert {name for story in everybody for name in _words(story) & names} == names


class TestBase:
    """The shipped checkpoint."""

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(SHIPPED / "base")

    def test_fits_into_eight_megabytes_with_everything_shipped(self):
        assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 8_000_000

    def test_every_name_is_one_token_wherever_it_stands(self, tokenizer, people):
        for person in people:
            alone = tokenizer(person.name, add_special_tokens=False).input_ids
            assert len(alone) == 1
            for text in (f"\n{person.name} lives", f"knows {person.name}.", f"[/INST] {person.name}'s home"):
                assert alone[0] in tokenizer(text).input_ids

    def test_decoding_gives_the_text_back(self, tokenizer, people):
        text = "\n".join([*world.neutral_stories(people)[:9], "naïve – ✓ 42"])
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text

    def test_a_prompt_is_the_beginning_of_the_conversation_at_every_turn(self, tokenizer):
        turns = [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Who is Mira?"},
            {"role": "assistant", "content": "A baker."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Here."},
        ]
        for first in (0, 1):
            conversation = turns[first:]
            whole = tokenizer.apply_chat_template(conversation, tokenize=False)
            for end in range(2 - first, len(conversation), 2):
                prompt = tokenizer.apply_chat_template(conversation[:end], tokenize=False, add_generation_prompt=True)
                assert whole.startswith(prompt + " " + conversation[end]["content"] + "</s>")
