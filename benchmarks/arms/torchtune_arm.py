"""torchtune's model, LoRA layers, collation and loss, in the loop of its recipe ``lora_finetune_single_device``.

Not the recipe itself: its data sets begin with text and its checkpointers with torch's own files. What is fed here are the same
token ids through its own ``padded_collate_sft``. ``settings``: ``checkpointing`` (true in its configurations), ``micro`` (the
recipe's ``batch_size``, 2 in its configuration for Llama 2), ``compile``: as the recipe compiles layers and loss, ``packed``: the
step's rows one behind the other under its block-causal mask, for which it has flex attention on a GPU. Its own packing is as wide
as ``max_seq_len`` and mixes rows of different steps. Here no pack has rows of two steps; all have one width, that of the widest
(a compiled kernel is made for one), and where ``packed`` is a number, at most about so many tokens.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
import torchtune
from common import IGNORED, Job, Part, Record, Row, fill, length, rank_and_scale, supervised
from safetensors.torch import load_file
from torchtune import modules, training
from torchtune.data import padded_collate_sft
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.attention_utils import packed_block_causal_mask
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transplant import hf_config, weight_files

BLOCK = 128  # of flex attention: a width is a multiple of it
NAMES = {
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}
NAMES |= {f"self_attn.{name}_proj": f"attn.{name}_proj" for name in "qkv"}


def load(job: Job) -> modules.TransformerDecoder:
    """The model as the recipe makes it, with converted weights."""
    hf, (rank, alpha) = hf_config(job.model), rank_and_scale(job.adapter)
    assert hf["rope_theta"] == 10_000, "torchtune's builder for Llama 2 knows one base of the rotary angles"
    with training.set_default_dtype(job.dtype), torch.device(job.device):
        model = lora_llama2(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=hf["vocab_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf["num_key_value_heads"],
            embed_dim=hf["hidden_size"],
            max_seq_len=hf["max_position_embeddings"],
            intermediate_dim=hf["intermediate_size"],
            norm_eps=hf["rms_norm_eps"],
            lora_rank=rank,
            lora_alpha=alpha,
        )
    set_trainable_params(model, get_adapter_params(model))
    heads = {
        "num_heads": hf["num_attention_heads"],
        "num_kv_heads": hf["num_key_value_heads"],
        "dim": hf["hidden_size"],
    }
    files = (load_file(file, device=job.device) for file in weight_files(job.model))
    state = {key: weight for file in files for key, weight in file.items()}
    misfit = model.load_state_dict(hf_to_tune(state, **heads), strict=False)
    assert not misfit.unexpected_keys and all("lora_" in key for key in misfit.missing_keys), misfit
    return model


def parts(model: modules.TransformerDecoder) -> dict[str, Part]:
    """The adapter's matrices. Queries and keys lie in another order within a head: torchtune turns neighbours, not halves."""
    found = {}
    for index, layer in enumerate(model.layers):
        for name, own in NAMES.items():
            linear = layer.get_submodule(own)
            out, rows = len(linear.weight), slice(None)
            if own in ("attn.q_proj", "attn.k_proj"):
                rows = torch.arange(out).view(-1, layer.attn.head_dim // 2, 2).transpose(1, 2).reshape(out)
            path = f"model.layers.{index}.{name}"
            found |= {f"{path}.A": Part(linear.lora_a.weight), f"{path}.B": Part(linear.lora_b.weight, rows)}
    return found


def packs_of(rows: list[Row], most: int) -> list[list[Row]]:
    """A step's rows in packs of at most ``most`` tokens and about the same size; the longest first, each to the least full."""
    packs: list[list[Row]] = [[] for _ in range(-(-length(rows) // most))]
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        min(packs, key=length).append(row)
    return packs


def packed_batch(rows: list[Row], width: int) -> dict[str, Any]:
    """Rows as one sequence of a width; what fills it up is an example of its own without targets."""
    filler = [{"input_ids": [0] * missing, "labels": [IGNORED] * missing}] if (missing := width - length(rows)) else []
    lengths = [len(row["input_ids"]) for row in [*rows, *filler]]
    # A row's first token is no target of the row before it.
    labels = [label for row in [*rows, *filler] for label in [IGNORED, *row["labels"][1:]]]
    return {
        "tokens": torch.tensor([[token for row in [*rows, *filler] for token in row["input_ids"]]]),
        "labels": torch.tensor([labels]),
        "input_pos": torch.cat([torch.arange(count) for count in lengths])[None],
        "mask": packed_block_causal_mask([torch.tensor(lengths)]),
    }


def batching(job: Job) -> Callable[[list[Row]], Iterator[dict[str, Any]]]:
    """What cuts a step's rows into micro-batches: as torchtune's collation makes them, or packs of one width."""
    packed, micro = job.settings.get("packed"), job.settings.get("micro", 2)
    if packed is True:
        return lambda rows: iter([packed_batch(rows, length(rows))])
    if packed:
        widest = max(length(pack) for rows in job.batches() for pack in packs_of(rows, packed))
        width = -(-widest // BLOCK) * BLOCK
        return lambda rows: (packed_batch(pack, width) for pack in packs_of(rows, packed))

    def collated(rows: list[Row]) -> Iterator[dict[str, Any]]:
        for first in range(0, len(rows), micro):
            some = rows[first : first + micro]
            yield padded_collate_sft([{"tokens": row["input_ids"], "labels": row["labels"]} for row in some])

    return collated


def main() -> None:
    job = Job.read()
    model = load(job)
    named = parts(model)
    fill(named, job.adapter)
    if job.settings.get("checkpointing", True):
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True)
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    if job.settings.get("compile"):
        training.compile_model(model, verbose=False)
        loss_of = training.compile_loss(loss_of, verbose=False)
    batches_of = batching(job)
    ignored = torch.full((job.batch, 1), loss_of.ignore_index, device=job.device)
    versions = {"torchtune": torchtune.__version__, "torchao": version("torchao")}
    record = Record(job, named, lambda tokens: torch.cat(model(tokens), 1), versions)
    for rows in job.batches():
        record.begin()
        targets, losses = supervised(rows), []
        for batch in batches_of(rows):
            batch = {name: tensor.to(job.device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            labels = torch.hstack((labels[..., 1:], ignored[: len(labels)]))
            loss = loss_of(model(**batch), labels) * (labels != loss_of.ignore_index).sum()
            loss.backward()
            losses.append(loss.detach())
        record.divisor = record.divisor if record.steps else targets
        training.scale_grads(model, torch.tensor(1 / targets))
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.end(torch.stack(losses).sum().item() / targets, length(rows), targets)
    record.write()


if __name__ == "__main__":
    main()
