"""From the model section of a recipe to a decoder."""

import os

import torch

from fusedlm.distributed import local
from fusedlm.model.decoder import Decoder, default_embedding_std
from fusedlm.model.precision import resolve_device
from fusedlm.nn.module import init_weights
from fusedlm.nn.mup import widen


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
        device: of the parameters: auto, cpu, cuda or cuda:N; "meta" gives shapes without memory, which `to_empty` and
            then `init_weights` or loading fill.
        seed: of the weights; None: drawn from torch's global generator.

    Raises:
        ValueError: vocab_size is not positive, there is no such device, or the parameters are larger than its memory.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}; a model predicts at least one token")
    if str(device) != "meta":
        device = resolve_device(device)
    with torch.device("meta"):
        model = _allocate(vocab_size, config)
    if str(device) == "meta":
        return model
    check_memory(model, device)
    model.to_empty(device=device)
    init_weights(model, seed)
    return model


def _allocate(vocab_size: int, config) -> Decoder:
    """A decoder; with `config.mup`, in the maximal update parametrisation: its embedding starts as that of the same
    decoder at base width, and `widen` sets the rest."""
    arguments = config.model_dump()
    mup = arguments.pop("mup", None)
    if mup is None:
        return Decoder(vocab_size=vocab_size, **arguments)
    if arguments["embedding_std"] is None:
        arguments["embedding_std"] = default_embedding_std(mup["base_width"], arguments["tie_embeddings"])
    model, base = Decoder(vocab_size=vocab_size, **arguments), _allocate(vocab_size, config.at_base_width())
    depth = len(model.blocks) / (mup["base_depth"] or len(model.blocks))
    model.mup = widen(model, base, model.all_blocks(), depth=depth, depth_exponent=mup["depth_exponent"])
    for block in model.all_blocks():
        block.branch_scale = model.mup.branch_scale()
    return model


def check_memory(model: Decoder, device: torch.device) -> None:
    """Allocating more than the memory of a CPU succeeds on some systems, and the process is killed when it writes.

    Raises:
        ValueError: this process's part of the parameters is larger than the memory of the device.
    """
    needed = sum(local(parameter).numel() * parameter.element_size() for parameter in model.parameters())
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise ValueError(
            f"model: {needed / 2**30:,.1f} GiB of weights do not fit the {total / 2**30:,.1f} GiB of memory; lower "
            "model.dim, model.n_layers or the widths of model.blocks"
        )
