"""The decoder on packed examples: isolation, recomputation, and where gradients stop."""

import pytest
import torch
from models import hidden, places, some_tokens, tiny
from torch import Tensor

from lamina.adapter import LoRA, adapted, attach
from lamina.model.decoder import Decoder, Linear
from lamina.ops.attention import Packed
from lamina.ops.loss import cross_entropy_sum

LENGTHS = (1, 7, 20, 3, 16)
EVERY_FAMILY = ["llama", "llama-grouped", "mistral", "qwen2", "qwen3"]


def with_adapter(family: str = "llama", dropout: float = 0.0, layers: str = "all", **changes: int) -> Decoder:
    """A model whose B is not zero, ready to train."""
    model = tiny(family, **changes)
    attach(model, LoRA(rank=4, dropout=dropout, layers=layers))
    for module in adapted(model).values():
        torch.nn.init.normal_(module.b, std=0.1)
    return model.train()


def loss_and_gradients(model: Decoder, tokens: Tensor, lengths: tuple[int, ...], checkpointed: int = 0) -> list[Tensor]:
    torch.manual_seed(5)  # dropout
    loss, _ = cross_entropy_sum(hidden(model, tokens, lengths, checkpointed), model.vocabulary, tokens.roll(-1))
    parameters = [p for module in adapted(model).values() for p in (module.a, module.b)]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_packed_is_separate(family: str) -> None:
    """Equal up to the kernels' order of sums, which a GEMM chooses by its number of rows: fp32, hidden states of about 1,
    two layers of sums over at most 64 products, so 1e-5 is some eighty ε."""
    model, tokens = tiny(family), some_tokens(LENGTHS)
    packed = hidden(model, tokens, LENGTHS)
    separate = torch.cat([hidden(model, part, [len(part)]) for part in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_another_text_in_one_example_moves_no_bit_of_the_others(family: str) -> None:
    model, tokens = tiny(family), some_tokens(LENGTHS)
    before = hidden(model, tokens, LENGTHS).split(LENGTHS)
    parts = list(tokens.split(LENGTHS))
    parts[2] = (parts[2] + 11) % 96
    after = hidden(model, torch.cat(parts), LENGTHS).split(LENGTHS)
    for example in range(len(LENGTHS)):
        assert torch.equal(before[example], after[example]) == (example != 2)


def test_poison_in_one_example_stays_there() -> None:
    model, tokens = tiny(), some_tokens(LENGTHS)
    tokens[tokens == 95] = 0
    tokens.split(LENGTHS)[2][4] = 95
    model.model.embed_tokens.weight.data[95] = float("nan")
    parts = hidden(model, tokens, LENGTHS).split(LENGTHS)
    assert [bool(part.isfinite().all()) for part in parts] == [True, True, False, True, True]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointed", [1, 2, 3, 9])
def test_recomputed_layers_change_no_bit(checkpointed: int, dropout: float) -> None:
    model, tokens = with_adapter(dropout=dropout, num_hidden_layers=3), some_tokens(LENGTHS)
    kept = loss_and_gradients(model, tokens, LENGTHS)
    recomputed = loss_and_gradients(model, tokens, LENGTHS, checkpointed)
    assert all(torch.equal(one, other) for one, other in zip(kept, recomputed, strict=True))


def test_inputs_kept_in_the_hosts_memory_change_no_bit() -> None:
    model, tokens = with_adapter(num_hidden_layers=3), some_tokens(LENGTHS)
    parameters = [p for module in adapted(model).values() for p in (module.a, module.b)]
    found, inputs = [], []
    for offload in (False, True):
        moved: list[torch.Size] = []

        def see(x: Tensor, moved: list[torch.Size] = moved) -> Tensor:
            moved.append(x.shape)
            return x

        with torch.autograd.graph.saved_tensors_hooks(see, lambda x: x):
            states = model(tokens, places(LENGTHS), Packed(LENGTHS), 2, offload)
        loss, _ = cross_entropy_sum(states, model.vocabulary, tokens.roll(-1))
        found.append(torch.autograd.grad(loss, parameters))
        # Hooks of the host's memory lie over these: what they take, these do not see.
        inputs.append(sum(shape == states.shape for shape in moved))
    assert inputs[0] - inputs[1] == 2, "the inputs of two layers"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_recomputed_layers_are_computed_again() -> None:
    model, tokens = with_adapter(num_hidden_layers=3), some_tokens(LENGTHS)
    calls = [0, 0, 0]

    def count(index: int) -> None:
        def hook(*_: object) -> None:
            calls[index] += 1

        model.model.layers[index].mlp.register_forward_pre_hook(hook)

    for index in range(3):
        count(index)
    loss_and_gradients(model, tokens, LENGTHS, checkpointed=2)
    assert calls == [2, 2, 1]
    with torch.no_grad():
        hidden(model, tokens, LENGTHS, checkpointed=2)
    assert calls == [3, 3, 2]


@pytest.mark.parametrize("checkpointed", [0, 3])
def test_no_gradient_flows_below_the_lowest_adapter(checkpointed: int) -> None:
    model, tokens = with_adapter(layers="1-2", num_hidden_layers=4), some_tokens(LENGTHS)
    needs: dict[int, bool] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, given, index=index: needs.update({index: given[0].requires_grad}))
    found = loss_and_gradients(model, tokens, LENGTHS, checkpointed)
    assert needs == {0: False, 1: False, 2: True, 3: True}
    assert all(gradient.any() for gradient in found[1:])


@pytest.mark.parametrize("family", EVERY_FAMILY)
@pytest.mark.parametrize("checkpointed", [0, 2])
def test_only_the_wanted_tokens_are_computed_at_the_end(family: str, checkpointed: int) -> None:
    """The rows of the whole result, in the order asked for, up to the order of a GEMM's sums; and the last MLP reads no others."""
    model, tokens = with_adapter(family), some_tokens(LENGTHS)
    wanted = torch.tensor([46, 0, 3, 30, 29])
    seen = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    given = tokens, places(LENGTHS), Packed(LENGTHS), checkpointed
    torch.testing.assert_close(model(*given, wanted=wanted), model(*given)[wanted], rtol=0, atol=1e-5)
    assert seen == [5, len(tokens)]


@pytest.mark.parametrize("name", ["q_proj", "up_proj", "o_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_any_linear_is_called(name: str, kind: str) -> None:
    """Linears that read the same input are one op, whose modules are not called."""
    model, seen = with_adapter(), []
    place = "mlp" if name == "up_proj" else "self_attn"
    linear = model.get_submodule(f"model.layers.1.{place}.{name}")
    getattr(linear, f"register_{kind}_hook")(lambda *_: seen.append(name))
    tokens = some_tokens(LENGTHS)
    hidden(model, tokens, LENGTHS).sum().backward()
    assert seen == [name]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("learns", [None, "weight", "bias"])
def test_a_frozen_linear_is_a_product_of_its_own_and_one_that_learns_is_torchs(learns: str | None, bias: bool) -> None:
    linear, x = Linear(7, 5, bias=bias).requires_grad_(False), torch.randn(4, 7, requires_grad=True)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(name == learns)
    learning = [parameter for parameter in linear.parameters() if parameter.requires_grad]
    out, expected = linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert ("_Project" in str(out.grad_fn)) == (not learning)
    upstream = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(y, [x, *learning], upstream) for y in (out, expected))
    assert torch.equal(out, expected) and all(map(torch.equal, found, wanted))
