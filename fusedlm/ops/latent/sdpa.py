"""Attention of new tokens to a latent state by torch's scaled_dot_product_attention."""

import torch

from fusedlm.ops.attention.reference import all_before, visibility_mask
from fusedlm.ops.attention.sdpa import cached
from fusedlm.ops.latent.reference import contiguous_state, subtract_noise


def latent_decode(
    q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
) -> torch.Tensor:  # fmt: skip
    """All heads are folded into the query axis, so that keys are read once. A state without pages and scales, of rows
    of one length, is read where it is; any other is copied first."""
    if starts is None and page_table is None and token_scale is None:
        keys = state[:, :, None]
        read = cached(q, keys, keys[..., :rank], scale, visible)
    else:
        n_keys = state.shape[1] if page_table is None else page_table.shape[1] * state.shape[1]
        if visible is None:
            visible = all_before(q.shape[1], n_keys, starts, q.device)
        seen = visibility_mask(visible, n_keys, starts)[:, 0]
        keys = contiguous_state(state, seen, page_table, token_scale, rope_key).to(q.dtype)[:, :, None]
        read = cached(q, keys, keys[..., :rank], scale, visible, starts)
        # A token that sees nothing reads zeros.
        read = read.masked_fill(~seen.any(-1)[:, :, None, None], 0.0)
    if n_signal < q.shape[2]:
        read = read.to(torch.promote_types(q.dtype, torch.float32))
    return subtract_noise(read, n_signal, noise_weight).to(q.dtype)
