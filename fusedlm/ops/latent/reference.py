"""Attention of new tokens to a latent state in plain PyTorch."""

import torch

from fusedlm.ops.attention.reference import all_before, visibility_mask

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def quantise_latent(latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (..., rank) in float8_e4m3fn and their scales (...,) float32: the largest element of each token becomes
    the largest number of the format."""
    wide = latent.float()
    scale = (wide.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale[..., None]).to(FP8), scale


def contiguous_state(state, seen_BTS, page_table_BP, token_scale, rope_key) -> torch.Tensor:
    """(B, S, rank + R) without pages and scales, of float32 or better where there are scales. Zeros where no token sees
    the state, whatever is there."""
    if token_scale is not None:
        state = torch.cat([state.float() * token_scale[..., None], rope_key], dim=-1)
    if page_table_BP is not None:
        pages = page_table_BP.long().clamp(0, len(state) - 1)  # those that no token sees may be anything
        state = state[pages].flatten(1, 2)
    return state.masked_fill(~seen_BTS.any(1)[..., None], 0)


def subtract_noise(read_BTHR, n_signal: int, weight) -> torch.Tensor:
    """signal - weight * noise, heads after the first n_signal being the noise of each or of all."""
    if n_signal == read_BTHR.shape[2]:
        return read_BTHR
    signal, noise = read_BTHR[:, :, :n_signal], read_BTHR[:, :, n_signal:]
    return signal - weight.to(read_BTHR.dtype)[..., None] * noise


def latent_decode(
    q, state, rank, scale, starts, visible, page_table, token_scale, rope_key, n_signal, noise_weight
) -> torch.Tensor:  # fmt: skip
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    n_keys = state.shape[1] if page_table is None else page_table.shape[1] * state.shape[1]
    if visible is None:
        visible = all_before(q.shape[1], n_keys, starts, q.device)
    seen = visibility_mask(visible, n_keys, starts)[:, 0]
    keys = contiguous_state(state, seen, page_table, token_scale, rope_key).to(compute_dtype)
    scores = torch.einsum("bthe,bse->bths", q.to(compute_dtype), keys)
    # A token that sees nothing reads zeros.
    weights = (scores * scale).masked_fill(~seen[:, :, None], float("-inf")).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1)[:, :, None, None], 0.0)
    read = torch.einsum("bths,bsr->bthr", weights, keys[..., :rank])
    return subtract_noise(read, n_signal, noise_weight).to(q.dtype)
