"""Constant factors of a decoder, folded into the weights beside them: other classes have no place for them."""

import torch

from fusedlm.config.model import ModelConfig
from fusedlm.model import Decoder


@torch.no_grad()
def folded(
    model: Decoder, config: ModelConfig, tensors: dict[str, torch.Tensor], *, keep_embedding_scale: bool = False
) -> tuple[dict[str, torch.Tensor], ModelConfig]:
    """The tensors, and the model section, of a decoder that computes the same without these factors: `embedding_rms`,
    `depth_scaled_norms` and those of `mup`; and without the modules of `mtp`, which logits do not depend on.

    Each factor is applied in the dtype of the tensor, as the forward pass does, so that a folded embedding is the input
    of the first block bit for bit. Elsewhere the result is the same up to rounding.

    Args:
        config: the model section that the decoder was built from.
        tensors: its parameters by name; not changed.
        keep_embedding_scale: leave `embedding_rms` as it is.
    """
    found, changes = dict(tensors), {}
    if config.mtp is not None:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(("mtp.", "mtp_"))}
        changes["mtp"] = None
    scale = model.embedding_scale
    if scale != 1.0 and not keep_embedding_scale:
        found["embedding.weight"] = found["embedding.weight"] * scale
        if model.tied:  # the head has the embedding as its weight, and must not grow with it
            found["head.norm.weight"] = found["head.norm.weight"] / scale
        changes["embedding_rms"] = None
    if config.depth_scaled_norms:
        for index, block in enumerate(model.blocks):
            for name in ("mixer_norm", "ffn_norm")[: len(block.parts())]:
                gain = f"blocks.{index}.{name}.weight"
                found[gain] = found[gain] * getattr(block, name).scale
                found.pop(f"blocks.{index}.{name}.scale")
        changes["depth_scaled_norms"] = False
    if config.mup is not None:
        _fold_mup(model, found)
        changes["mup"] = None
    return found, config.model_copy(update=changes)


def _fold_mup(model: Decoder, tensors: dict[str, torch.Tensor]) -> None:
    """The factors of logits, of residual branches and of attention scores."""
    if model.head.norm.scale is not None:
        tensors["head.norm.weight"] = tensors["head.norm.weight"] * model.head.norm.scale
    for index, block in enumerate(model.blocks):
        ends = [] if block.ffn is None else _feed_forward_ends(block.ffn)
        for name in (f"mixer.{block.mixer.branch_end}.weight", *ends):
            tensors[f"blocks.{index}.{name}"] = tensors[f"blocks.{index}.{name}"] * block.branch_scale
        queries = _queries(block.mixer)
        if queries is None:
            continue
        name, key_dim = f"blocks.{index}.mixer.{queries[0]}", queries[1]
        weight = tensors[name].clone()
        weight[: queries[2]] *= block.mixer.scale * key_dim**0.5
        tensors[name] = weight


def _feed_forward_ends(ffn: torch.nn.Module) -> list[str]:
    """The parameters whose products are the output of a feed-forward."""
    if ffn.branch_end is not None:
        return [f"ffn.{ffn.branch_end}.weight"]
    return [name for name in ("ffn.experts.down", "ffn.shared.down.weight") if hasattr(ffn, name.split(".")[1])]


def _queries(mixer: torch.nn.Module) -> tuple[str, int, int] | None:
    """The parameter that makes queries, the width of a key, and the leading rows that are queries; None: the mixer has
    no scores."""
    if hasattr(mixer, "qkv") and hasattr(mixer, "q_gain"):
        if mixer.q_gain is not None:  # a norm undoes factors before it
            return "q_gain", mixer.head_dim, len(mixer.q_gain)
        return "qkv.weight", mixer.head_dim, mixer.n_heads * mixer.head_dim
    if hasattr(mixer, "q_up"):
        return "q_up.weight", mixer.head_dim + mixer.rope[0], mixer.q_widths[0]
    return None
