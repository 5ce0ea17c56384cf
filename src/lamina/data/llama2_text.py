"""Text that is already rendered for Llama-2: ``<s>[INST] … [/INST] … </s>``, one turn or several.

Several turns stand in blocks of their own, ``<s>…</s><s>…</s>``, as Llama-2 was trained, or in one block, where only
the last answer has an end token. Both are read as they stand.
"""

BOS, EOS, OPEN, CLOSE = "<s>", "</s>", "[INST]", "[/INST]"


def find_turns(text: str, bos: str, eos: str) -> tuple[str, list[tuple[int, int]], int]:
    """Finds every answer, with its end token where it has one.

    The markers that begin and end a block become those of the tokenizer; ``<s>`` or ``</s>`` inside an answer (HTML)
    is left alone. White space around the whole is dropped.

    Args:
        bos: the tokenizer's token that begins a text, or nothing.
        eos: its end token.

    Returns:
        The text, with as many ``bos`` before it as it held; the character range of each answer that is not blank; the
        number of those that are.
    """
    text = text.strip()
    start = text.find(OPEN)
    held = text.count(BOS, 0, start)
    written = bos * held + text[text.rfind(BOS, 0, start) + len(BOS) if held else 0 : start]
    answers, blank = [], 0
    while start >= 0:
        close = text.find(CLOSE, start) + len(CLOSE)
        following = text.find(OPEN, close)
        if text.find(CLOSE, following) < 0:  # an answer may speak of [INST]; a turn also has its [/INST]
            following = -1
        tail = text[close : following if following >= 0 else len(text)]
        body = tail.rstrip()
        while body.endswith(BOS):
            body = body.removesuffix(BOS).rstrip()
        between = tail[len(body) :].replace(BOS, bos) if following >= 0 else ""
        answer = body.removesuffix(EOS)
        written += text[start:close]
        begin = len(written)
        written += answer + (eos if answer != body else "")
        if answer.strip():
            answers.append((begin, len(written)))
        else:
            blank += 1
        written += between
        start = following
    return written, answers, blank
