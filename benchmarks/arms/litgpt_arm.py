"""litgpt's model, LoRA layers, Fabric precision and loss, in the loop of its recipe ``litgpt.finetune.lora``.

Not the recipe itself: it reads text through litgpt's own data modules and tokenizer, and knows no clipping. What is fed here are
the same token ids, padded to the longest row of a micro-batch as its collate function does. ``settings``: Fabric's ``precision``
(bf16-mixed, the recipe's default, or bf16-true), ``micro`` (1 by default, as in the recipe; litgpt has no packing, and no
checkpointing to choose on one device), and ``weighting``: the recipe divides the loss of each micro-batch by its own targets and
takes the mean of those ("rows"), so a token of a short row counts for more; otherwise it is divided once, by the step's targets,
as in every other arm.
"""

from importlib.metadata import version
from typing import Any

import lightning
import torch
from common import IGNORED, Job, Part, Record, fill, length, rank_and_scale, supervised
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transplant import hf_config, weight_files


def config_of(job: Job) -> Config:
    """litgpt's description of the model, with LoRA on all linears."""
    hf, (rank, alpha) = hf_config(job.model), rank_and_scale(job.adapter)
    adapted = ("query", "key", "value", "projection", "mlp")
    return Config(
        name="benchmark",
        block_size=hf["max_position_embeddings"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_embd=hf["hidden_size"],
        n_head=hf["num_attention_heads"],
        n_query_groups=hf["num_key_value_heads"],
        intermediate_size=hf["intermediate_size"],
        norm_class_name="RMSNorm",
        norm_eps=hf["rms_norm_eps"],
        rope_base=int(hf["rope_theta"]),
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        mlp_class_name="LLaMAMLP",
        lora_r=rank,
        lora_alpha=alpha,
        **{f"lora_{name}": True for name in adapted},
    )


def parts(model: GPT, config: Config) -> dict[str, Part]:
    """The adapter's matrices; those of q, k and v lie in one parameter, one below the other."""
    found, rank = {}, config.lora_r
    edges = [0, config.n_head, config.n_head + config.n_query_groups, config.n_head + 2 * config.n_query_groups]
    for index, block in enumerate(model.transformer.h):
        path = f"model.layers.{index}"
        for number, name in enumerate("qkv"):
            first, last = (edge * config.head_size for edge in edges[number : number + 2])
            found[f"{path}.self_attn.{name}_proj.A"] = Part(
                block.attn.qkv.lora_A, slice(rank * number, rank * (number + 1))
            )
            found[f"{path}.self_attn.{name}_proj.B"] = Part(block.attn.qkv.lora_B, slice(first, last))
        plain = {"self_attn.o_proj": block.attn.proj, "mlp.gate_proj": block.mlp.fc_1}
        for name, layer in (plain | {"mlp.up_proj": block.mlp.fc_2, "mlp.down_proj": block.mlp.proj}).items():
            found |= {f"{path}.{name}.A": Part(layer.lora_A), f"{path}.{name}.B": Part(layer.lora_B)}
    return found


def load(job: Job, fabric: lightning.Fabric, config: Config) -> GPT:
    """The model as the recipe makes it, with converted weights and the common adapter."""
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    state: dict[str, Tensor] = {}
    waiting: dict[int, Any] = {}  # q, k and v become one matrix, and may lie in different files
    for file in weight_files(job.model):
        copy_weights_hf_llama(config, waiting, state, load_file(file, device=job.device))
    misfit = model.load_state_dict(state, strict=False)
    assert not misfit.unexpected_keys and all("lora_" in key for key in misfit.missing_keys), misfit
    return model


def main() -> None:
    job = Job.read()
    precision = "32-true" if job.precision == "fp32" else job.settings.get("precision", "bf16-mixed")
    micro, by_rows = job.settings.get("micro", 1), job.settings.get("weighting") == "rows"
    fabric = lightning.Fabric(accelerator=job.device, devices=1, precision=precision)
    config = config_of(job)
    bare = load(job, fabric, config)
    named = parts(bare, config)
    fill(named, job.adapter)
    model = fabric.setup_module(bare)
    trained = [p for p in bare.parameters() if p.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0, fused=True))
    record = Record(job, named, model, {name: version(name) for name in ("litgpt", "lightning")})
    for rows in job.batches():
        record.begin()
        targets, losses = supervised(rows), []
        bare.max_seq_length = max(len(row["input_ids"]) for row in rows)
        for first in range(0, len(rows), micro):
            some = rows[first : first + micro]
            tokens, labels = (
                pad_sequence([torch.tensor(row[name]) for row in some], batch_first=True, padding_value=filler)
                for name, filler in (("input_ids", 0), ("labels", IGNORED))
            )
            logits = model(tokens.to(fabric.device), lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            loss = chunked_cross_entropy(logits, labels[..., 1:].to(fabric.device))
            loss = loss * (len(some) / len(rows) if by_rows else supervised(some) / targets)
            fabric.backward(loss)
            losses.append(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=job.clip)
        optimizer.step()
        optimizer.zero_grad()
        record.end(torch.stack(losses).sum().item(), length(rows), targets)
    record.write()


if __name__ == "__main__":
    main()
