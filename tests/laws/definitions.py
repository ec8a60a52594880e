"""Ops as they are defined, in matrix products that torch's FLOP counter counts."""

from functools import partial

import torch

from fusedlm.ops.differential_linear import reference
from fusedlm.ops.experts.reference import activate


def delta_rule(q, k, v, log_decay, beta, state, reset, chunk_size):
    """One token after another: recall by k, write, read by q."""
    batch, n_tokens, heads, key_dim = q.shape
    state = torch.zeros(batch * heads, key_dim, v.shape[3]) if state is None else state.flatten(0, 1)
    outputs = []
    for t in range(n_tokens):
        q_t, k_t, v_t = (x[:, t].flatten(0, 1)[:, None] for x in (q, k, v))
        state = state * log_decay[:, t].exp().flatten()[:, None, None]
        recalled = torch.bmm(k_t, state)
        state = state + torch.bmm(k_t.mT, beta[:, t].flatten()[:, None, None] * (v_t - recalled))
        outputs.append(torch.bmm(q_t, state)[:, 0].unflatten(0, (batch, heads)))
    return torch.stack(outputs, 1).to(v.dtype), state.unflatten(0, (batch, heads))


def linear_attention(q, k, v, log_decay, state, reset, chunk_size):
    """One token after another: write, read by q."""
    batch, n_tokens, heads, value_dim = v.shape
    q, k = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    state = torch.zeros(batch * heads, q.shape[3], value_dim) if state is None else state.flatten(0, 1)
    outputs = []
    for t in range(n_tokens):
        q_t, k_t, v_t = (x[:, t].flatten(0, 1)[:, None] for x in (q, k, v))
        state = state * log_decay[:, t].exp().flatten()[:, None, None] + torch.bmm(k_t.mT, v_t)
        outputs.append(torch.bmm(q_t, state)[:, 0].unflatten(0, (batch, heads)))
    return torch.stack(outputs, 1).to(v.dtype), state.unflatten(0, (batch, heads))


differential_linear_attention = partial(reference.differential_linear_attention, attend=linear_attention)


def window_attention(q, k, v, scale, positions, window, boundaries):
    """Each token against the `window` keys up to its own, those before the start masked."""
    batch, n_tokens, heads, _ = q.shape
    index = torch.arange(n_tokens)[:, None] - torch.arange(window - 1, -1, -1)  # (T, window)
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2)[:, index.clamp(min=0)] for x in (k, v))
    k, v = (x.permute(0, 1, 3, 2, 4).flatten(0, 2) for x in (k, v))  # (B T H, window, D)
    scores = torch.bmm(q.flatten(0, 2)[:, None] * scale, k.mT).unflatten(0, (batch, n_tokens, heads))
    weights = scores.masked_fill((index < 0)[None, :, None, None], -torch.inf).softmax(-1)
    return torch.bmm(weights.flatten(0, 2), v)[:, 0].unflatten(0, (batch, n_tokens, heads))


def routed_experts(x, w_up, w_down, indices, weights, activation, slope):
    """Token by token, so that no token's rounding depends on how many others use its experts."""
    y = torch.zeros_like(x)
    for slot in range(indices.shape[1]):
        up, down = (w[indices[:, slot]] for w in (w_up, w_down))
        hidden = activate(torch.bmm(x[:, None], up.mT), activation, slope)
        y = y + weights[:, slot, None] * torch.bmm(hidden, down.mT)[:, 0]
    return y
