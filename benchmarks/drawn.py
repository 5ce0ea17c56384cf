"""A random model of any size straight on its device: no file, and never two copies of it.

The decoder is made on ``meta``, its memory allocated once, and its numbers drawn there (normal, std 0.02, as Llama's are
initialised; norms are 1). A quantised matrix is drawn in the computation's dtype, quantised and let go before the next one.
"""

import checkpoint
import torch
from workload import SEED, Shape

from lamina.model.architecture import Architecture, read_architecture
from lamina.model.decoder import Decoder
from lamina.model.quantised import Base, quantise_leaves, quantised_of


def architecture_of(shape: Shape) -> Architecture:
    """A Llama of these sizes, as ``checkpoint.config_of`` describes it."""
    return read_architecture(checkpoint.config_of(shape), "config.json")


def drawn(shape: Shape, dtype: torch.dtype, device: torch.device, base: Base | None) -> Decoder:
    """The model: frozen, in evaluation mode, as ``load_model`` gives it."""
    with torch.device("meta"):
        model = Decoder(architecture_of(shape)).to(dtype).requires_grad_(False).eval()
    if base is not None:
        quantise_leaves(model, base, True, dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, checkpoint.STD, generator=generator)
    for linear in quantised_of(model):
        weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device)
        linear.form.store(weight.normal_(0.0, checkpoint.STD, generator=generator))
        del weight  # or the next one stands beside it
    return model
