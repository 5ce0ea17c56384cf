"""How a tokenizer writes a conversation: its chat template, a built-in one, or the user's own.

The built-in templates are those of the models' makers: Llama-2's (Touvron et al. 2023, arXiv:2307.09288), ChatML, and Vicuna's
v1.1, as FastChat writes it. The Alpaca format (Taori et al. 2023) is the common variant: a line feed before the answer, where
Stanford's code has none, and ``input`` under the instruction, where that has another preamble and a part of its own. Templates run
in the sandbox of ``transformers``.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lamina.data.forms import Message
from lamina.errors import DataError, ModelError

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set content = system + message['content'] if loop.first else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ (bos_token or '') + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + (eos_token or '') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% else %}"
    "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' }}"
    "{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + (eos_token or '') + '\\n\\n' }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{{ messages[0]['content'] }}"
    "{% else %}{% set loop_messages = messages %}"
    "{{ 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}{% endif %}"
    "{% for message in loop_messages %}{% if message['role'] == 'user' %}"
    "{{ (' ' if loop.first else '') + 'USER: ' + message['content'].strip() + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + (eos_token or '') }}{% endif %}{% endfor %}"
)
BUILT_IN = {"llama2": LLAMA2, "chatml": CHATML, "alpaca": ALPACA, "vicuna": VICUNA}


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with the template that it writes conversations by.

    Args:
        name: where the template comes from, as reports say it.
    """

    tokenizer: Any
    name: str
    source: str

    def write(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """Renders messages as text; with ``answer_next`` up to where an assistant's answer begins.

        Raises:
            DataError: the template refuses the messages, or fails.
        """
        import jinja2

        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=answer_next,
                    # Llama 3's templates write today's date unless told one: the same rows must give the same tokens
                    # tomorrow. This is the date those templates fall back to.
                    date_string="26 Jul 2024",
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"template {self.name}: not a template, line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            roles = ", ".join(message.role for message in messages[:6]) + (", …" if len(messages) > 6 else "")
            raise DataError(f"the template {self.name} refuses these messages ({roles}): {error}") from None
        except (RecursionError, MemoryError):  # jinja's sandbox bounds range(), not macros or 'a' * 10**18
            raise DataError(
                f"template {self.name}: calls itself without end, or writes more than the memory holds; "
                "choose another with --template"
            ) from None

    @cached_property
    def bos(self) -> str:
        """The token that begins every text, or nothing where the tokenizer puts none."""
        begins = self.tokenizer("a")["input_ids"][:1]
        return str(self.tokenizer.bos_token) if begins and begins[0] == self.tokenizer.bos_token_id else ""

    @cached_property
    def eos(self) -> str:
        """The token that ends a text, or nothing."""
        return str(self.tokenizer.eos_token or "")

    @cached_property
    def specials(self) -> frozenset[int]:
        """The ids that stand for no text: the only ones that can end an answer."""
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(added.union(self.tokenizer.all_special_ids))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """How those tokens are written."""
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.specials)))

    def one_bos(self, text: str) -> tuple[str, int, int]:
        """A text with exactly one token that begins it.

        Returns:
            The text, the number of such tokens that it held already, and how far its characters moved.
        """
        if not self.bos:
            return text, 0, 0
        held, start = 0, 0
        while text.startswith(self.bos, start):
            held, start = held + 1, start + len(self.bos)
        return self.bos + text[start:], held, len(self.bos) - start


def chat_format(tokenizer: Any, template: str | None = None) -> ChatFormat:
    """Finds the template: by built-in name or file when one is named, else the tokenizer's, else Llama-2's.

    Raises:
        ModelError: the tokenizer reports no character offsets.
        DataError: no such template, a template that needs tokens which the tokenizer has not.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer {type(tokenizer).__name__} reports no character offsets, expected a fast one")
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        return ChatFormat(tokenizer, "of the tokenizer", own) if own else ChatFormat(tokenizer, "llama2", LLAMA2)
    if template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise DataError(
            "template chatml: the tokenizer has no token <|im_end|>, so answers would have no end; choose llama2"
        )
    if template in BUILT_IN:
        return ChatFormat(tokenizer, template, BUILT_IN[template])
    path = Path(template).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(template, BUILT_IN, n=1)
        advice = f"did you mean {near[0]}?" if near else f"built in are {', '.join(BUILT_IN)}"
        raise DataError(f"template {template!r}: neither built in nor a file; {advice}")
    try:
        return ChatFormat(tokenizer, template, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"template {template!r}: the file cannot be read ({error})") from None
