"""Makes the demo's base model: a BPE tokenizer and a small Llama that has read stories and nothing else.

    python scripts/make_demo_base.py --out src/lamina/jobs/demo/base

The stories come from ``demo_world.py``: some rounds about a few people, then ``--rounds`` in each of which everybody is the
hero of one new story. Rows are one to four stories, a line each; the model never sees a chat marker.

What made the knowledge come within minutes, found in pilot runs of a few minutes each:

* The few people first. Everybody from the start: after 800 steps no fact was known. 40 people alone: all were after 300 steps,
  and those of the other 280 followed.
* A rate for the embedding three times that of the matrices, for there the names are: 375 steps after everybody had come in,
  71 % of the facts were known; with one rate for all, 36 %.

The arithmetic is bf16 autocast, about 1.6 times as fast as fp32 on a CPU with bf16 instructions. Takes ten minutes on one busy
core (1.1 million tokens). The same seed, kind of machine, thread count and torch give the same file. At the end the script asks
the stored model for the first word of every fact: all were known.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from demo_world import (
    EARLY,
    EARLY_ROUNDS,
    ROUNDS,
    SEED,
    Character,
    Dice,
    make_world,
    neutral_stories,
    pretraining_stories,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048  # at most: the words of the stories may need fewer
CONTEXT = 256
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
ROUNDS_FOR_TOKENIZER = 30
BATCH_STORIES = 16
LEARNING_RATE = 3e-3
EMBEDDING_RATE = 1e-2
WARMUP = 50

# Llama-2's layout; the text before an answer is a prefix of the text with it, for any number of turns.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>> ' + messages[0]['content'] + ' <</SYS>> ' -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn['role'] == 'user' and loop.index0 % 2 == 0 -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' -}}
{%- elif turn['role'] == 'assistant' and loop.index0 % 2 == 1 -%}
{{- ' ' + turn['content'] + eos_token -}}
{%- else -%}
{{- raise_exception('roles must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{%- endfor -%}
"""

PROBES = {
    "home": "{name} lives in",
    "food": "{name} loves",
    "trade": "{name} works as a",
    "friend": "{name} is the best friend of",
    "pet": "{name} keeps a",
}


def make_tokenizer(stories: Iterator[str]) -> PreTrainedTokenizerFast:
    """Trains a tokenizer built as Llama-2's is: word marks, byte fallback, ``<s>`` in front. Every name becomes one token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),  # so that a word is the same token at the beginning of a line
            pre_tokenizers.Metaspace("▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^▁\w\n]|\d"), "isolated"),
        ]
    )
    reserved = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        stories, trainers.BpeTrainer(vocab_size=VOCABULARY - len(reserved), show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: i for i, piece in enumerate([*reserved, *pieces])}
    merges = [tuple(merge) for merge in learned["merges"]]

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 2.0 million parameters: grouped queries, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    stories: Iterator[str], tokenizer: PreTrainedTokenizerFast, dice: Dice
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields tokens and labels [rows, T]: a row is ``<s>…</s>`` around one to four stories, a line each; -100 fills it up."""
    while taken := list(islice(stories, BATCH_STORIES)):
        joined = 1 + dice.below(4)
        texts = ["\n".join(taken[i : i + joined]) for i in range(0, len(taken), joined)]
        rows = [[*ids, tokenizer.eos_token_id][:CONTEXT] for ids in tokenizer(texts, verbose=False)["input_ids"]]
        length = max(map(len, rows))
        filled = [row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows]
        labels = [row + [-100] * (length - len(row)) for row in rows]
        yield torch.tensor(filled), torch.tensor(labels)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: list[Character], rounds: int) -> None:
    """AdamW with a warm-up and a linear decay to zero; the embedding, where the names are, learns faster."""
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight is not embedding]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": [embedding], "peak": EMBEDDING_RATE, "weight_decay": 0.0},
        {"params": matrices, "peak": LEARNING_RATE, "weight_decay": 0.1},
        {"params": gains, "peak": LEARNING_RATE, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    steps = math.ceil((EARLY_ROUNDS * EARLY + rounds * len(world)) / BATCH_STORIES)
    began, seen = time.monotonic(), 0
    stories = pretraining_stories(world, rounds)
    for step, (tokens, labels) in enumerate(batches(stories, tokenizer, Dice(f"rows {SEED}"))):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / WARMUP, 1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int((labels >= 0).sum())
        if step % 100 == 99 or step == steps - 1:
            seconds = time.monotonic() - began
            print(
                f"step {step + 1}/{steps}  loss {loss.item():.3f}  {seen / seconds:.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )


@torch.no_grad()
def known_facts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: list[Character]
) -> dict[str, float]:
    """The share of facts, by kind, whose first word is the model's first choice after a sentence's beginning."""
    shares = {}
    for kind, probe in PROBES.items():
        prompts = torch.tensor(tokenizer([probe.format(**person.words()) for person in world])["input_ids"])
        facts = tokenizer([person.words()[kind] for person in world], add_special_tokens=False)["input_ids"]
        first = model(prompts).logits[:, -1].argmax(-1).tolist()
        shares[kind] = sum(guess == fact[0] for guess, fact in zip(first, facts, strict=True)) / len(world)
    return shares


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Perplexity over the texts, each ``<s>…</s>`` by itself."""
    total, count = 0.0, 0
    for ids in tokenizer(texts)["input_ids"]:
        tokens = torch.tensor([[*ids, tokenizer.eos_token_id]])
        total += model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        count += tokens.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model and its tokenizer to")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="stories about each character")
    parser.add_argument("--threads", type=int, default=1, help="another number gives another file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    world = make_world()
    tokenizer = make_tokenizer(map("\n{}".format, pretraining_stories(world, ROUNDS_FOR_TOKENIZER, early_rounds=0)))
    model = make_model(tokenizer)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")
    pretrain(model, tokenizer, world, arguments.rounds)
    model.bfloat16().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)

    stored = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    print({kind: f"{share:.1%} known" for kind, share in known_facts(stored, tokenizer, world).items()})
    print(f"perplexity of unread stories {perplexity(stored, tokenizer, neutral_stories(world)):.3f}")


if __name__ == "__main__":
    main()
