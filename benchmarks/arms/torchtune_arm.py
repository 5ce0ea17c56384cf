"""torchtune's model, LoRA layers, collation and loss, in the loop of its recipe ``lora_finetune_single_device``.

Not the recipe itself: its data sets begin with text and its checkpointers with torch's own files. What is fed here are the same
token ids through its own ``padded_collate_sft``. ``settings``: ``checkpointing`` (true in its configurations), ``micro`` (the
recipe's ``batch_size``, 2 in its configuration for Llama 2), ``packed``: the step's rows as one sequence under a block-causal
mask. Its own packing is as wide as ``max_seq_len`` and mixes rows of different steps; and where flex attention is there, it makes
the mask on a GPU alone, so the plain mask stands in, which torchtune itself takes under older versions of torch.
"""

from importlib.metadata import version

import torch
import torchtune
from common import Job, Part, Record, Row, fill, rank_and_scale, supervised
from safetensors.torch import load_file
from torch import Tensor
from torchtune import modules, training
from torchtune.data import padded_collate_sft
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transplant import hf_config, weight_files

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
    state = {key: weight for file in weight_files(job.model) for key, weight in load_file(file).items()}
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


def batch_of(rows: list[Row], packed: bool) -> dict[str, Tensor]:
    """A micro-batch, as torchtune's collation makes it, or its rows packed into one."""
    if not packed:
        return padded_collate_sft([{"tokens": row["input_ids"], "labels": row["labels"]} for row in rows])
    lengths = [len(row["input_ids"]) for row in rows]
    # A row's first token is no target of the row before it.
    labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
    return {
        "tokens": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([labels]),
        "input_pos": torch.cat([torch.arange(length) for length in lengths])[None],
        "mask": create_block_causal_mask([torch.tensor(lengths)]),
    }


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
    micro, packed = job.settings.get("micro", 2), job.settings.get("packed", False)
    ignored = torch.full((job.batch, 1), loss_of.ignore_index, device=job.device)
    versions = {"torchtune": torchtune.__version__, "torchao": version("torchao")}
    record = Record(job, named, lambda tokens: torch.cat(model(tokens), 1), versions)
    for rows in job.batches():
        record.begin()
        targets, losses = supervised(rows), []
        for first in range(0, len(rows), job.batch if packed else micro):
            batch = batch_of(rows[first : first + (job.batch if packed else micro)], packed)
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
        record.end(torch.stack(losses).sum().item() / targets, sum(len(row["input_ids"]) for row in rows), targets)
    record.write()


if __name__ == "__main__":
    main()
