"""What a checkpoint's ``config.json`` says about the computation, and nothing else.

``read_architecture`` turns the file into an ``Architecture``: every number the decoder needs, none that it ignores. The
reading is closed: each key of the file is either read here, known to change nothing that we compute (``keys.IRRELEVANT``),
or switched off (null, false, empty). Whatever is left is a feature that we would silently leave out, and therefore an
error; so are values that the decoder does not compute. All of them are named at once. Reason: a model computed without
its soft-capping or its RoPE scaling still talks, only worse, and nobody finds out why.

Files written by transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``,
``layer_types``, ``dtype``) are both understood. Defaults for absent keys are those of transformers' config classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lamina.errors import ModelError
from lamina.model.keys import Keys, read_json, short

STORABLE = (
    "computed are bitsandbytes' 4-bit and 8-bit forms; name the unquantised model that this one was made from as --model, with "
    "--base nf4 for four bits"
)
"""What to say of a model that is stored quantised in another form."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Rope:
    """The frequencies of the rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are scaled."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Architecture:
    """Everything the decoder computes, nothing else."""

    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    norm_eps: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]
    """Per layer: how many tokens back (itself included) a token sees; None means all."""
    max_position: int


@dataclass(frozen=True)
class _Defaults:
    """What transformers' config class of a family assumes when ``config.json`` leaves a key out."""

    kv_heads: int | None = None  # None: as many as query heads
    head_width: int | None = None  # None: width / heads
    max_position: int = 32768
    window: int | None = 4096


_DEFAULTS = {
    "llama": _Defaults(max_position=2048, window=None),
    "mistral": _Defaults(kv_heads=8, max_position=131072),
    "qwen2": _Defaults(kv_heads=32),
    "qwen3": _Defaults(kv_heads=32, head_width=128),
}


def read_config(folder: Path) -> Architecture:
    """Reads the architecture of the checkpoint in ``folder``.

    Raises:
        ModelError: there is no ``config.json``, it is not a JSON object, or ``read_architecture`` refuses it.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no config.json; a model folder holds config.json, *.safetensors and a tokenizer; check the name"
        )
    return read_architecture(read_json(path), str(path))


def read_architecture(config: dict[str, Any], where: str) -> Architecture:
    """Reads a parsed ``config.json``.

    Args:
        config: the JSON object; not changed.
        where: the file's name, for messages.

    Raises:
        ModelError: one line naming every key that is missing, malformed, or asks for something not computed here.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(
            f"{where}: model_type is {family!r}; the decoder computes {', '.join(FAMILIES)}; choose a model of these families"
        )
    keys = Keys(config)
    keys.read.add("model_type")
    architecture = _read(keys, family)
    keys.refuse_leftovers()
    if keys.problems:
        raise ModelError(f"{where}: the decoder does not compute this model: {'; '.join(keys.problems)}")
    return architecture


def _read(keys: Keys, family: str) -> Architecture:
    default = _DEFAULTS[family]
    width, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    # An explicit null means "as many as query heads", in every family; only an absent key means the family's default.
    kv_heads = keys.size("num_key_value_heads", default=default.kv_heads or heads, null=heads)
    if not keys.problems and heads % kv_heads:
        keys.problem(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_width = keys.size("head_dim", default=default.head_width or width // heads, null=width // heads)
    if "head_dim" not in keys.config and default.head_width is None and width % heads:
        keys.problem(f"hidden_size {width} is not a multiple of num_attention_heads {heads} and head_dim is not given")
    if head_width % 2:
        keys.problem(f"head_dim {head_width} is odd; rotary positions turn pairs")
    max_position = keys.size("max_position_embeddings", default=default.max_position)
    attention_bias = family in ("llama", "qwen3") and keys.flag("attention_bias")
    keys.must_be("hidden_act", "silu")
    keys.must_be("attention_dropout", 0)
    _refuse_storage(keys)
    return Architecture(
        family=family,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=keys.size("intermediate_size"),
        vocabulary=keys.size("vocab_size"),
        norm_eps=keys.number("rms_norm_eps", default=1e-6),
        rope=_rope(keys, max_position),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and keys.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        tied=keys.flag("tie_word_embeddings"),
        windows=_windows(keys, family, layers, default.window),
        max_position=max_position,
    )


def _refuse_storage(keys: Keys) -> None:
    quantised = keys.take("quantization_config")
    method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
    if method not in (None, "bitsandbytes"):  # what that stored is read by ``storage``
        keys.problem(f"quantization_config: the weights are stored quantised by {method}, {STORABLE}")
    if keys.take("auto_map"):
        keys.problem("auto_map: the checkpoint brings its own code, which is never run")


def _windows(keys: Keys, family: str, layers: int, default: int | None) -> tuple[int | None, ...]:
    """Window per layer: mistral has it in all layers; qwen2 and qwen3 from layer ``max_window_layers`` on."""
    windows: tuple[int | None, ...] = (None,) * layers
    if family == "mistral":
        windows = (keys.size_or_none("sliding_window", default),) * layers
    if family in ("qwen2", "qwen3"):
        window = keys.size_or_none("sliding_window", default)
        first = keys.size("max_window_layers", default=28, minimum=0)
        if keys.flag("use_sliding_window"):
            windows = tuple(window if layer >= first else None for layer in range(layers))
        else:
            window = None
        kinds = keys.take("layer_types")
        if kinds is not None:
            return _windows_by_name(keys, kinds, layers, window)
        return windows
    # transformers reads layer_types for the Qwen families only: elsewhere it must not contradict.
    same = ["full_attention" if window is None else "sliding_attention" for window in windows]
    if (kinds := keys.take("layer_types", same)) not in (same, None):
        keys.problem(f"layer_types {short(kinds)}: {family} attends in the same way in every layer")
    return windows


def _windows_by_name(keys: Keys, kinds: Any, layers: int, window: int | None) -> tuple[int | None, ...]:
    """Windows from the names that transformers 5 writes, one per layer."""
    if not isinstance(kinds, list) or len(kinds) != layers:
        keys.problem(f"layer_types: found {short(kinds)}, expected a list of {layers} names")
        return (None,) * layers
    strange = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if strange:
        keys.problem(f"layer_types {', '.join(strange)} (computed: full_attention, sliding_attention)")
    if window is None and "sliding_attention" in kinds:
        keys.problem(
            "layer_types names sliding_attention, but use_sliding_window and sliding_window do not set a window"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(keys: Keys, max_position: int) -> Rope:
    """RoPE from ``rope_parameters`` (transformers 5) or ``rope_scaling`` and ``rope_theta`` (transformers 4)."""
    name = "rope_scaling" if keys.config.get("rope_scaling") else "rope_parameters"
    keys.read |= {"rope_scaling", "rope_parameters"}
    given = keys.config.get(name) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        keys.problem(f"{name}: found {short(given)}, expected one flat object for all layers")
        given = {}
    own = Keys(given, f"{name}.")
    theta = own.number("rope_theta", default=keys.number("rope_theta", default=10000.0))
    kind = own.take("rope_type", own.take("type", "default"))
    rope = Rope(theta)
    if kind == "linear":
        rope = Rope(theta, "linear", own.number("factor"))
    elif kind == "llama3":
        rope = Rope(
            theta,
            "llama3",
            own.number("factor"),
            own.number("low_freq_factor"),
            own.number("high_freq_factor"),
            own.size("original_max_position_embeddings", default=max_position),
        )
    elif kind != "default":
        own.read |= given.keys()  # its other keys belong to it and need no mention
        keys.problem(f"RoPE scaling {kind!r} (computed: default, linear, llama3)")
    for holder in (keys, own):
        holder.must_be("partial_rotary_factor", 1)
    own.refuse_leftovers()
    keys.problems += own.problems
    return rope
