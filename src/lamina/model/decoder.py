"""The decoder of the Llama family, on packed examples: one page from token ids to hidden states.

Parameter names are those of Hugging Face checkpoints, so weights load without renaming and PEFT adapters fit. In fp32 on a
CPU the logits equal those of transformers bit for bit; every operation below is therefore in transformers' order. The
decoder knows no adapters (leaves are replaced), no loss (it returns hidden states) and no cache (attention is handed in).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lamina.model.architecture import Architecture, Rope
from lamina.ops.frozen import Dense
from lamina.ops.lora import Projection, project
from lamina.ops.norm import rms_norm
from lamina.ops.rotary import rotate
from lamina.ops.shapes import Float, Int
from lamina.ops.swiglu import swiglu


@runtime_checkable  # so that the tests can check the annotations that name it
class Attend(Protocol):
    """How the tokens of a layer look at each other: packed examples in training, a cache in generation."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> Tensor:  # q [N, H, h], k and v [N, K, h] -> [N, H, h]
        ...


class Norm(nn.Module):
    """Root mean square norm: x / √(mean x² + ε) · weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """x·Wᵀ + b, by the products of adapted linears, of which it may be a neighbour, where W is frozen."""

    def projection(self) -> Projection | None:
        """What the linear computes, for an op that takes several; none where W learns."""
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        return None if learns else Projection(Dense(self.weight), self.bias)

    def forward(self, x: Tensor) -> Tensor:  # [N, in] -> [N, out]
        projection = self.projection()
        return super().forward(x) if projection is None else project(x, projection)[0]


def together(x: Float[Tensor, "N D"], *linears: nn.Module) -> Sequence[Tensor]:
    """The outputs of linears that read the same input, as one op where each says what it computes.

    A module in a linear's place says what it computes by a method ``projection``, or None to be called by itself. So is one with a
    hook, which wants to see its module's own call.
    """
    asked = [getattr(linear, "projection", None) for linear in linears]
    if all(asked) and not any(map(_hooked, linears)):
        projections = [ask() for ask in asked if ask]
        if all(projections):
            return project(x, *projections)
    return [linear(x) for linear in linears]


def _hooked(module: nn.Module) -> bool:
    before = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(before or module._forward_hooks or module._backward_hooks)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.layer, self.window, self.head_width = layer, a.windows[layer], a.head_width
        self.q_proj = Linear(a.width, a.heads * a.head_width, bias=a.qkv_bias)
        self.k_proj = Linear(a.width, a.kv_heads * a.head_width, bias=a.qkv_bias)
        self.v_proj = Linear(a.width, a.kv_heads * a.head_width, bias=a.qkv_bias)
        self.o_proj = Linear(a.heads * a.head_width, a.width, bias=a.output_bias)
        self.q_norm = Norm(a.head_width, a.norm_eps) if a.qk_norm else nn.Identity()
        self.k_norm = Norm(a.head_width, a.norm_eps) if a.qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "N D"], cos: Tensor, sin: Tensor, attend: Attend, wanted: Int[Tensor, " S"] | None = None
    ) -> Float[Tensor, "S D"]:
        heads = (x.shape[0], -1, self.head_width)
        query, key, value = [out.view(heads) for out in together(x, self.q_proj, self.k_proj, self.v_proj)]
        query = rotate(self.q_norm(query), cos, sin)  # [N, H, h]
        key = rotate(self.k_norm(key), cos, sin)  # [N, K, h]; value as well
        mixed = attend(self.layer, query, key, value, self.window).flatten(1)
        out: Tensor = self.o_proj(_of(mixed, wanted))
        return out


def _of(x: Float[Tensor, "N D"], wanted: Int[Tensor, " S"] | None) -> Float[Tensor, "S D"]:
    return x if wanted is None else x.index_select(0, wanted)


class MLP(nn.Module):
    """The gated MLP, SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_proj = Linear(a.width, a.mlp_width, bias=a.mlp_bias)
        self.up_proj = Linear(a.width, a.mlp_width, bias=a.mlp_bias)
        self.down_proj = Linear(a.mlp_width, a.width, bias=a.mlp_bias)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        out: Tensor = self.down_proj(swiglu(*together(x, self.gate_proj, self.up_proj)))
        return out


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each added to the residual stream after a norm of it."""

    def __init__(self, a: Architecture, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(a.width, a.norm_eps)
        self.self_attn = Attention(a, layer)
        self.post_attention_layernorm = Norm(a.width, a.norm_eps)
        self.mlp = MLP(a)

    def forward(
        self, x: Float[Tensor, "N D"], cos: Tensor, sin: Tensor, attend: Attend, wanted: Int[Tensor, " S"] | None = None
    ) -> Float[Tensor, "S D"]:
        x = _of(x, wanted) + self.self_attn(self.input_layernorm(x), cos, sin, attend, wanted)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and final norm: what checkpoints call ``model``."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        # Not drawn: on the meta device that would load the packages of torch.compile, for a second.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(a.vocabulary, a.width), freeze=False)
        self.layers = nn.ModuleList(Layer(a, layer) for layer in range(a.layers))
        self.norm = Norm(a.width, a.norm_eps)


class Decoder(nn.Module):
    """A language model of the Llama family, without its loss: token ids to hidden states."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.fingerprint: str | None = None  # of the stored weights, where those in memory were rounded from them
        self.model = Trunk(architecture)
        self.lm_head = None if architecture.tied else nn.Linear(architecture.width, architecture.vocabulary, bias=False)

    @property
    def vocabulary(self) -> Float[Tensor, "V D"]:
        """The matrix that turns hidden states into logits: the head's weight, or the embedding where they are tied."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def forward(
        self,
        tokens: Int[Tensor, " N"],
        position: Int[Tensor, " N"],
        attend: Attend,
        checkpointed: int = 0,
        offload: bool = False,
        wanted: Int[Tensor, " S"] | None = None,
    ) -> Float[Tensor, "S D"]:
        """Computes the hidden states after the final norm.

        Args:
            tokens: ids of the packed tokens.
            position: of each token in its example, from 0.
            attend: the attention within each example.
            checkpointed: how many layers, from the first, keep only their input and are computed again in the backward
                pass (Chen et al. 2016, arXiv:1604.06174).
            offload: keep those inputs in the host's memory.
            wanted: the tokens whose hidden states are returned, all if not given. Nothing looks at the others after the last
                attention, so what follows it is computed for these alone.
        """
        x = self.model.embed_tokens(tokens)
        cos, sin = angles(self.architecture.rope, self.architecture.head_width, position, x.dtype)
        for index, layer in enumerate(self.model.layers):
            of = wanted if index + 1 == len(self.model.layers) else None
            if index < checkpointed and torch.is_grad_enabled():
                with save_on_cpu(pin_memory=x.is_cuda) if offload else nullcontext():
                    x = checkpoint(partial(layer, cos=cos, sin=sin, attend=attend, wanted=of), x, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend, of)
        hidden: Tensor = self.model.norm(x)
        return hidden


def angles(rope: Rope, head_width: int, position: Int[Tensor, " N"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each [N, h/2], of position · frequency, computed in fp32 and rounded to ``dtype``."""
    phase = position[:, None].float() * frequencies(rope, head_width).to(position.device, non_blocking=True)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def frequencies(rope: Rope, head_width: int) -> Float[Tensor, " half"]:
    """Radians per position of each pair of dimensions, fp32: θ^(-2i/h), stretched for longer contexts where asked.

    ``linear`` divides all by the factor; ``llama3`` divides the slow ones, keeps the fast ones and blends between
    (Llama 3.1, Dubey et al. 2024, arXiv:2407.21783).
    """
    fast = 1.0 / (rope.theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width))
    if rope.kind == "default":
        return fast
    slow = fast / rope.factor
    if rope.kind == "linear":
        return slow
    wavelength = 2 * torch.pi / fast
    longest, shortest = (rope.original_max_position / f for f in (rope.low_freq_factor, rope.high_freq_factor))
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * fast / rope.factor + blend * fast
    return torch.where(wavelength > longest, slow, torch.where(wavelength < shortest, fast, blended))
