"""From the model section of a recipe to a decoder."""

import os

import torch

from fusedlm.model.decoder import Decoder
from fusedlm.nn.module import init_weights


def build_model(
    config,
    *,
    vocab_size: int,
    device: str | torch.device = "cpu",
    seed: int | None = None,
) -> Decoder:
    """The decoder of a recipe, its float32 parameters drawn; the same on every device.

    Args:
        config: `recipe.model`, or anything whose `model_dump()` gives the arguments of `Decoder`.
        vocab_size: tokens that can be predicted.
        device: of the parameters; "meta" gives shapes without memory, which `to_empty` and then `init_weights` or
            loading fill.
        seed: of the weights; None: drawn from torch's global generator.

    Raises:
        ValueError: vocab_size is not positive, or the parameters are larger than the memory of the device.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}; a model predicts at least one token")
    device = torch.device(device)
    with torch.device("meta"):
        model = Decoder(vocab_size=vocab_size, **config.model_dump())
    if device.type == "meta":
        return model
    _check_memory(model, device)
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


def _check_memory(model: Decoder, device: torch.device) -> None:
    """Allocating more than the memory of a CPU succeeds on some systems, and the process is killed when it writes."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise ValueError(
            f"model: {needed / 2**30:,.1f} GiB of weights do not fit the {total / 2**30:,.1f} GiB of memory; lower "
            "model.dim, model.n_layers or the widths of model.blocks"
        )
