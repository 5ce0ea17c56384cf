"""The conversation: its commands, what it remembers, and what happens when an answer fails or is cut short."""

import sys
from collections.abc import Iterator, Sequence

import pytest
from tokens import pieces as tokenizer_of_pieces

from lamina.commands.chat import HELP, converse, lines, pieces
from lamina.data.forms import Message
from lamina.errors import DataError

Asked = tuple[list[tuple[str, str]], bool]


class Talk:
    """A conversation with an answerer that notes what it is asked."""

    def __init__(self, *said: str, system: str | None = None, has_adapter: bool = True) -> None:
        self.asked: list[Asked] = []
        self.written = ""
        converse(said, self.answer, self.write, system, has_adapter)

    def answer(self, messages: Sequence[Message], adapted: bool) -> Iterator[str]:
        self.asked.append(([(message.role, message.content) for message in messages], adapted))
        last = messages[-1].content
        if last == "fail":
            raise DataError("the template refuses\x1b[2J it")
        yield " an"
        if last == "interrupt":
            raise KeyboardInterrupt
        yield "swer\x07"

    def write(self, text: str) -> None:
        self.written += text


def test_turns_are_remembered_until_they_are_forgotten() -> None:
    talk = Talk("one", "", "two", "/reset", "three")
    assert [messages for messages, _ in talk.asked] == [
        [("user", "one")],
        [("user", "one"), ("assistant", "answer\x07"), ("user", "two")],
        [("user", "three")],
    ]
    assert talk.written == "answer\ufffd\nanswer\ufffd\n[the conversation begins anew]\nanswer\ufffd\n"


def test_base_switches_the_adapter_off_and_on() -> None:
    assert [adapted for _, adapted in Talk("a", "/base", "b", "/base", "c").asked] == [True, False, True]


def test_a_base_has_no_adapter_to_switch() -> None:
    talk = Talk("/base", "a", has_adapter=False)
    assert [adapted for _, adapted in talk.asked] == [False]
    assert "[this is a base: there is no adapter to switch off]" in talk.written


def test_the_system_prompt_is_set_and_removed() -> None:
    talk = Talk("a", "/system Be brief.", "b", "/system", "c", system="Be kind.")
    assert [messages for messages, _ in talk.asked] == [
        [("system", "Be kind."), ("user", "a")],
        [("system", "Be brief."), ("user", "b")],
        [("user", "c")],
    ]
    assert "[system prompt set; the conversation begins anew]" in talk.written
    assert "[system prompt removed; the conversation begins anew]" in talk.written


def test_help_quit_and_unknown_commands() -> None:
    talk = Talk("/help", "/hlep\x1b", "/quit", "never")
    assert talk.written == f"{HELP}\n[no command /hlep\ufffd; /help lists them]\n"
    assert talk.asked == []


def test_an_answer_that_fails_is_told_and_its_question_forgotten() -> None:
    talk = Talk("fail", "one")
    assert talk.written == "[the template refuses\ufffd[2J it]\nanswer\ufffd\n"
    assert talk.asked[-1][0] == [("user", "one")]


def test_an_interrupt_cuts_an_answer_short() -> None:
    talk = Talk("interrupt", "one")
    assert talk.written.startswith("an …\n")
    assert talk.asked[-1][0] == [("user", "interrupt"), ("assistant", "an"), ("user", "one")]


def test_an_interrupt_before_the_answer_ends_the_chat() -> None:
    def never(messages: Sequence[Message], adapted: bool) -> Iterator[str]:
        raise KeyboardInterrupt
        yield ""

    with pytest.raises(KeyboardInterrupt):
        converse(["a"], never, len, None, True)


def test_pieces_together_are_the_text() -> None:
    tokenizer = tokenizer_of_pieces()
    text = "the cat: naïve 👩 saw"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(pieces(tokenizer, tokens)) == text
    assert "".join(pieces(tokenizer, tokens[:-6])).endswith("\ufffd") is tokenizer.decode(tokens[:-6]).endswith(
        "\ufffd"
    )


def test_a_terminal_is_asked_until_its_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = iter(["one", "two"])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        for line in said:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    assert list(lines(terminal=True)) == ["one", "two"]
    assert capsys.readouterr().out == "\n"


def test_a_pipe_is_read_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", iter(["one\n", "two"]))
    assert list(lines(terminal=False)) == ["one", "two"]
