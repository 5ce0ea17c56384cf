"""The adapter: laid on, taken off and drawn; every refusal by its text. What PEFT chooses is in tests/parity."""

import math
import re
from typing import Any

import pytest
import torch
from models import hidden, logits, some_tokens, tiny
from torch import nn

from lamina.adapter import AdaptedLinear, LoRA, adapted, adapter_scale, attach, detach, layers_of, matches
from lamina.errors import AdapterError, ConfigError
from lamina.model.decoder import together

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def refusal(**settings: Any) -> str:
    """The message with which a tiny model refuses these settings; nothing may have been replaced."""
    model = tiny(num_hidden_layers=3)
    with pytest.raises(ConfigError) as error:
        attach(model, LoRA(**{"rank": 4, **settings}))
    assert not adapted(model)
    return str(error.value)


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "mistral", "qwen2", "qwen3"])
def test_with_b_zero_the_model_is_exactly_the_base(family: str) -> None:
    model, tokens = tiny(family), some_tokens([20])
    before = logits(model, tokens)
    modules = attach(model, LoRA(rank=4))
    assert torch.equal(logits(model, tokens), before)
    for module in modules.values():
        nn.init.normal_(module.b)
    assert not torch.equal(logits(model, tokens), before)


def test_attach_adapts_all_seven_of_every_layer_and_detach_restores_them() -> None:
    model, tokens = tiny(), some_tokens([20])
    names, linears = list(model.state_dict()), {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    before = logits(model, tokens)
    modules = attach(model, LoRA(rank=4))
    expected = [
        f"model.layers.{layer}.{'mlp' if leaf in LEAVES[4:] else 'self_attn'}.{leaf}"
        for layer in (0, 1)
        for leaf in LEAVES
    ]
    assert list(modules) == expected == list(adapted(model))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{path}.{factor}" for path in expected for factor in "ab"
    ]
    for module in modules.values():
        nn.init.normal_(module.b)
    detach(model)
    assert list(model.state_dict()) == names
    assert {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)} == linears
    assert torch.equal(logits(model, tokens), before)


def test_masters_are_fp32_beside_a_bf16_base() -> None:
    model = tiny(dtype=torch.bfloat16)
    for module in attach(model, LoRA(rank=4)).values():
        assert module.a.dtype == module.b.dtype == torch.float32
        assert module.base.weight.dtype == torch.bfloat16
    assert hidden(model, some_tokens([5]), [5]).dtype == torch.bfloat16


def test_a_is_uniform_within_one_over_root_inputs() -> None:
    """PEFT: kaiming_uniform with a = √5. 32,768 draws: their largest is below the bound, and above 0.999 of it but for odds
    of e^-16; the variance bound²/3 is met to six of its standard errors, 6·√(4/5/32768) = 3 %."""
    model = tiny(hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    a = attach(model, LoRA(rank=64, targets=("q_proj",)))["model.layers.0.self_attn.q_proj"].a.detach()
    bound = 1 / math.sqrt(512)
    assert 0.999 * bound < a.abs().max() <= bound
    assert abs(a.var().item() / (bound**2 / 3) - 1) < 0.03
    assert abs(a.mean().item()) < 6 * bound / math.sqrt(3 * a.numel())


def test_a_depends_on_seed_and_path_and_on_nothing_else() -> None:
    def drawn(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(int.from_bytes(repr((seed, settings)).encode()[:4], "big"))
        return {path: module.a.detach() for path, module in attach(tiny(), LoRA(rank=4, **settings), seed).items()}

    everything, some, other = drawn(1), drawn(1, targets=("v_proj",), layers="1"), drawn(2)
    assert list(some) == ["model.layers.1.self_attn.v_proj"]
    for path, a in some.items():
        assert torch.equal(a, everything[path])
    assert not any(torch.equal(everything[path], other[path]) for path in everything)
    flat = torch.stack([a.flatten()[:128] for path, a in everything.items() if "down" not in path])
    assert len(flat.unique(dim=0)) == len(flat), "two modules share their numbers"


def test_dropout_acts_on_the_adapter_alone_and_in_training_only() -> None:
    model, tokens = tiny(), some_tokens([20])
    base = logits(model, tokens)
    modules = attach(model, LoRA(rank=4, dropout=0.5))
    assert not any(module.training for module in modules.values()), "the model was in evaluation mode"
    assert torch.equal(logits(model.train(), tokens), base), "with B = 0 dropout must not touch the base's part"
    for module in modules.values():
        nn.init.normal_(module.b)
    torch.manual_seed(0)
    first, second = logits(model, tokens), logits(model, tokens)
    torch.manual_seed(0)
    assert torch.equal(logits(model, tokens), first) and not torch.equal(second, first)
    model.eval()
    assert torch.equal(logits(model, tokens), logits(model, tokens))


def test_strength() -> None:
    model, tokens = tiny(), some_tokens([20])
    base = logits(model, tokens)
    for module in attach(model, LoRA(rank=4)).values():
        nn.init.normal_(module.b, std=0.1)
    tuned = logits(model, tokens)
    with adapter_scale(model, 0.0):
        assert torch.equal(logits(model, tokens), base)
        with adapter_scale(model, 0.5):
            half = logits(model, tokens)
        assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), tuned)
    with pytest.raises(ZeroDivisionError), adapter_scale(model, 0.0):
        raise ZeroDivisionError
    assert torch.equal(logits(model, tokens), tuned)
    for module in adapted(model).values():
        module.b.data *= 0.5
    # s·½ and B·½ are the same number in every product, because halving is exact
    assert torch.equal(logits(model, tokens), half)
    next(iter(adapted(model).values())).b.data[:] = float("nan")
    with adapter_scale(model, 0.0):
        assert torch.equal(logits(model, tokens), base), "the base does not depend on what lies beside it"


def test_patterns_ranges_and_scales() -> None:
    lora = LoRA(
        rank=8, alpha=16, layers="0,2-3", targets=("q_proj", r"mlp\..*_proj"),
        rank_pattern={r"layers\.2\.self_attn\.q_proj": 2, "q_proj": 4}, alpha_pattern={"mlp.up_proj": 3},
    )  # fmt: skip
    modules = attach(tiny(num_hidden_layers=5), lora)
    assert {path.split(".")[2] for path in modules} == {"0", "2", "3"}
    assert {path.split(".", 3)[3] for path in modules} == {
        "self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip

    def at(layer: int, leaf: str) -> tuple[int, float]:
        module: AdaptedLinear = modules[f"model.layers.{layer}.{leaf}"]
        return module.a.shape[0], module.scale

    assert at(0, "self_attn.q_proj") == (4, 4.0)
    assert at(2, "self_attn.q_proj") == (2, 8.0)
    assert at(3, "mlp.up_proj") == (8, 3 / 8)
    assert at(3, "mlp.down_proj") == (8, 2.0)
    assert LoRA(rank=16, alpha=8, rslora=True).scale_of("any") == 8 / 4


def test_matching_is_of_whole_names() -> None:
    assert matches("q_proj", "model.layers.0.self_attn.q_proj")
    assert not matches("proj", "model.layers.0.self_attn.q_proj")
    assert not matches("q_proj", "model.layers.0.self_attn.q_proj.base")
    assert matches("q_proj|v_proj", "model.layers.0.self_attn.v_proj")
    assert not matches(r"layers\.1\..*", "model.layers.11.mlp.up_proj")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", [0, 1, 2, 3]), ("0", [0]), ("1-3", [1, 2, 3]), ("3,0-1", [0, 1, 3]), ("1,1,0-1", [0, 1])],
)
def test_layer_ranges(text: str, expected: list[int]) -> None:
    assert layers_of(text, 4) == expected


@pytest.mark.parametrize("text", ["4", "0-4", "2-1", "0,7"])
def test_layers_the_model_does_not_have(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^adapter\.layers: found '.*', expected layers between 0 and 3"):
        layers_of(text, 4)


@pytest.mark.parametrize("text", ["", "-1", "1-", "a", "1;2", "0 1"])
def test_layers_that_are_no_range(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"layers: found '{text}', expected text that matches")):
        LoRA(layers=text)


def test_every_target_and_pattern_that_matches_nothing_is_named() -> None:
    assert refusal(targets=("q_proj", "c_attn"), rank_pattern={"wte": 2}, alpha_pattern={"h": 2.0}) == (
        f"adapter.targets: 'c_attn' matches no linear of the model, whose names are {NAMES}; "
        f"adapter.rank_pattern: 'wte' matches no linear of the model, whose names are {NAMES}; "
        f"adapter.alpha_pattern: 'h' matches no linear of the model, whose names are {NAMES}"
    )
    assert "'lm_head' matches no linear" in refusal(targets=("lm_head",))
    assert "matches no linear" in refusal(targets=(r"layers\.2\.mlp\.up_proj",), layers="0-1")


def test_targets_that_are_empty() -> None:
    assert refusal(targets=()) == "adapter.targets: found nothing to adapt; name at least one linear, or all-linear"


def test_broken_expressions_are_all_named() -> None:
    text = refusal(targets=("q_proj", "("), rank_pattern={"[": 2})
    assert text.startswith("adapter.targets: '(' is no regular expression (missing )")
    assert "; adapter.rank_pattern: '[' is no regular expression (unterminated character set" in text
    assert "'(?i)Q_PROJ' is no regular expression (global flags" in refusal(targets=("(?i)Q_PROJ",))


def test_rank_larger_than_a_matrix() -> None:
    assert refusal(rank=33, targets=("up_proj",), layers="1") == (
        "adapter.rank: found 33, expected at most 32, the smaller side of model.layers.1.mlp.up_proj "
        "(1 of 1 matrices are too small)"
    )
    assert refusal(rank=33).endswith("(21 of 21 matrices are too small)")
    assert "adapter.rank: found 40, expected at most 32" in refusal(rank_pattern={"q_proj": 40})
    attach(tiny(), LoRA(rank=32))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank: found 0, expected an integer ≥ 1"),
        ({"alpha": 0.0}, "alpha: found 0.0, expected a number > 0"),
        ({"dropout": 1.0}, "dropout: found 1.0, expected a number ≥ 0 and < 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: found {q_proj = 0}"),
        ({"r": 8}, "r: is no setting"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        LoRA(**settings)


def test_a_second_adapter_is_refused() -> None:
    model = tiny()
    attach(model, LoRA(rank=4, targets=("q_proj",)))
    with pytest.raises(AdapterError, match="already carries an adapter; detach it before"):
        attach(model, LoRA(rank=4, targets=("v_proj",)))
    detach(model)
    attach(model, LoRA(rank=4, targets=("v_proj",)))


def test_with_dropout_siblings_read_an_input_each() -> None:
    modules = attach(tiny(), LoRA(rank=4, dropout=0.5))
    linears = [modules[f"model.layers.0.self_attn.{name}_proj"].train() for name in "qk"]
    for module in linears:
        nn.init.normal_(module.b)
    x = torch.randn(20, linears[0].base.in_features)
    torch.manual_seed(0)
    each = [linear(x) for linear in linears]
    torch.manual_seed(0)
    at_once = together(x, *linears)
    assert all(torch.equal(one, other) for one, other in zip(at_once, each, strict=True))
    assert not torch.equal(each[0], linears[0].eval()(x)), "nothing was dropped"


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_a_hook_sees_its_linear_among_siblings_adapted_or_not(name: str) -> None:
    model, seen = tiny(), []
    attach(model, LoRA(rank=4, targets=("q_proj",)))
    tokens = some_tokens((5, 4))
    expected = hidden(model, tokens, (5, 4))
    hooked = model.get_submodule(f"model.layers.0.self_attn.{name}")
    hooked.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    assert torch.equal(hidden(model, tokens, (5, 4)), expected)
    assert len(seen) == 1 and len(seen[0]) == 2
