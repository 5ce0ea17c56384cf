"""The held-out loss is the definition's, whatever the batches; answers and neutral text are cut where they should be."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import SIZE, logits, some_tokens, tiny
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn

from lamina import evaluation as module
from lamina import neutral
from lamina.data.render import Rendered
from lamina.errors import ConfigError, DataError
from lamina.evaluation import Answers, Evaluating, Evaluation, answers, evaluate
from lamina.generation import Sampling, generate
from lamina.neutral import read_neutral

BOS, END = 0, 1


def characters(**special: str) -> Any:
    """A tokenizer of single characters, ``<s>`` and ``</s>``."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": BOS, "</s>": END, **{chr(code): code - 30 for code in range(32, 126)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special)


@pytest.fixture(scope="module")
def letters() -> Any:
    return characters(bos_token="<s>")


def some_rows(count: int) -> list[Rendered]:
    """Rows of different lengths, about half of their tokens supervised, the last one among them."""
    random = np.random.default_rng(0)
    rows = []
    for row in range(1, count + 1):
        length = int(random.integers(2, 30))
        trained = random.random(length) < 0.5
        trained[0], trained[-1] = False, True
        rows.append(Rendered(random.integers(0, SIZE["vocab_size"], length).astype(np.int32), trained, row))
    return rows


def by_definition(model: Any, rows: list[Rendered]) -> Evaluation:
    loss, count, correct = 0.0, 0, 0
    for row in rows:
        tokens = torch.from_numpy(row.tokens).long()
        scores = logits(model, tokens).log_softmax(1)
        for place in np.flatnonzero(row.trained):
            loss -= float(scores[place - 1, tokens[place]])
            count += 1
            correct += int(scores[place - 1].argmax() == tokens[place])
    return Evaluation(loss / count, count, correct)


@pytest.mark.parametrize("budget", [1, 37, 64, 10_000])
def test_the_loss_is_the_definitions_at_every_budget(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny(dtype=torch.float64), some_rows(40)
    expected = by_definition(model, rows)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 16)
    found = evaluate(model, iter(rows), budget)
    assert (found.tokens, found.correct) == (expected.tokens, expected.correct)
    # The scores are rounded to fp32, relative 6e-8 each; sums are in float64.
    assert found.loss == pytest.approx(expected.loss, rel=1e-7)
    assert evaluate(model, rows, budget) == found


def test_perplexity_and_accuracy() -> None:
    found = Evaluation(loss=2.0, tokens=8, correct=6)
    assert found.perplexity == math.exp(2)
    assert found.accuracy == 0.75
    assert Evaluation(loss=1e4, tokens=1, correct=0).perplexity == math.inf


def test_dropout_is_off_and_gradients_are_not_kept() -> None:
    model, rows = tiny(), some_rows(5)
    expected = evaluate(model, rows, 64)
    model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.5)).train()
    model.requires_grad_(True)
    assert evaluate(model, rows, 64) == expected
    assert model.model.norm.training
    logits(model, some_tokens([5])).sum().backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_nothing_held_out_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"^found no held-out rows to evaluate, expected at least one; set eval_fraction a"
    ):
        evaluate(tiny(), [], 64)


def conversation(row: int, *spans: tuple[list[int], bool]) -> Rendered:
    tokens = [token for ids, _ in spans for token in ids]
    trained = [learnt for ids, learnt in spans for _ in ids]
    return Rendered(np.array(tokens, dtype=np.int32), np.array(trained), row)


def test_answers_stand_beside_the_references(letters: Any) -> None:
    model = tiny()
    prompt, other = [BOS, 40, 41, 42], [BOS, 50, 51]
    [own] = generate(model, [prompt], Sampling(max_new_tokens=6), set(), seed=0)
    end = own.tokens[4]
    own_answer = list(own.tokens[: own.tokens.index(end)])
    found = answers(
        model,
        [
            conversation(3, ([BOS], False), ([60, 61, END], True)),  # plain text: nothing to ask
            conversation(5, (prompt, False), ([2, *own_answer, 2, END], True)),  # 2 is a space
            conversation(6, ([BOS, *[30] * SIZE["max_position_embeddings"]], False), ([60], True)),  # no room to answer
            conversation(7, (other, False), ([70, 71, END], True), ([72], False), ([73, END], True)),
            conversation(8, (other, False), ([70], True)),
        ],
        letters,
        {end},
        samples=2,
        max_new_tokens=6,
    )
    assert isinstance(found, Answers)
    first, second = found.rows
    [expected] = generate(model, [other], Sampling(max_new_tokens=6), {end}, seed=0)
    assert (first.row, first.prompt, first.reference) == (5, "FGH", f" {first.answer} ")
    assert first.answer == letters.decode(own_answer)
    assert (first.stopped, first.exact, first.tokens) == (True, True, len(own_answer))
    assert (second.row, second.prompt, second.reference) == (7, "PQ", "de")
    assert (second.stopped, second.exact, second.tokens) == (expected.stopped, False, len(expected.tokens))
    tokens = (len(own_answer) + len(expected.tokens)) / 2
    assert found.per_row().mean(0).tolist() == [(1 + expected.stopped) / 2, 0.5, tokens, 1]


def test_an_answer_that_is_cut_off_has_not_stopped(letters: Any) -> None:
    row = conversation(1, ([BOS, 40, 41], False), ([60, END], True))
    found = answers(tiny(), [row], letters, set(), samples=5, max_new_tokens=3)
    assert found is not None
    assert found.per_row()[0, [0, 2]].tolist() == [0, 3]


def test_rows_without_prompts_give_no_answers(letters: Any) -> None:
    assert answers(tiny(), [conversation(1, ([BOS], False), ([60, END], True))], letters, {END}, 4, 8) is None


def test_neutral_text_is_read_in_windows(tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "neutral.txt"
    text = "".join(chr(97 + place % 26) for place in range(30))
    path.write_text(text + "~~~", encoding="utf-8")
    monkeypatch.setattr(neutral, "NEUTRAL_TOKENS", 30)
    rows = read_neutral(path, letters, max_position=13)
    assert [len(row.tokens) for row in rows] == [13, 13, 7]
    assert all(row.tokens[0] == BOS and not row.trained[0] and row.trained[1:].all() for row in rows)
    assert letters.decode([token for row in rows for token in row.tokens[1:]]) == text
    assert evaluate(tiny(), rows, 64).tokens == 30
    assert len(read_neutral(path, letters, max_position=4096)) == 1


def test_neutral_text_of_a_tokenizer_without_bos(tmp_path: Path) -> None:
    path = tmp_path / "neutral.txt"
    path.write_text("abcdefghi", encoding="utf-8")
    rows = read_neutral(path, characters(), max_position=4)
    assert [len(row.tokens) for row in rows] == [4, 4]  # the ninth letter alone predicts nothing


def test_special_tokens_in_neutral_text_are_text(tmp_path: Path, letters: Any) -> None:
    path = tmp_path / "neutral.txt"
    path.write_text("</s>", encoding="utf-8")
    assert read_neutral(path, letters, 512)[0].tokens.tolist() == [BOS, *(ord(letter) - 30 for letter in "</s>")]


def test_neutral_text_that_cannot_be_read(tmp_path: Path, letters: Any) -> None:
    with pytest.raises(
        DataError, match=r"none.txt: cannot be read \(No such file .*\), expected a text file; check neutral"
    ):
        read_neutral(tmp_path / "none.txt", letters, 512)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(
        DataError, match="empty.txt: found no text, expected some for measuring forgetting; check neutral"
    ):
        read_neutral(tmp_path / "empty.txt", letters, 512)
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(DataError, match=r"bytes.txt: not UTF-8 text \(.*0xff.*\), expected a text file; check neutral"):
        read_neutral(tmp_path / "bytes.txt", letters, 512)


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"eval_samples": -1}, {"eval_max_new_tokens": 0}, {"neutral": 3}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: found .*, expected"):
            Evaluating(**wrong)  # type: ignore[arg-type]
