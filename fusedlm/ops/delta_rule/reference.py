"""The gated delta rule (arXiv 2412.06464, eq. 10) in plain PyTorch, token by token and in chunks.

Per head, with a state S of (K, V):  S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  o_t = S_t^T q_t.
G sets of q and k serve H value heads, H / G consecutive ones each.
"""

import torch


def recurrent(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT=None):
    """Token by token: the definition, and what decoding runs."""
    outputs = []
    state = state_BHKV
    for t in range(q_BTHK.shape[1]):
        decay = log_decay_BTH[:, t].exp()
        if reset_BT is not None:
            decay = decay.masked_fill(reset_BT[:, t, None], 0.0)
        state = state * decay[..., None, None]
        k, v = k_BTHK[:, t], v_BTHV[:, t]
        recalled = (state * k[..., None]).sum(-2)
        update = beta_BTH[:, t, :, None] * (v - recalled)
        state = state + k[..., None] * update[..., None, :]
        outputs.append((state * q_BTHK[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, dim=1), state


def chunked(q_BTHK, k_BTHK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT=None, chunk_size=64):
    """The same with one sequential step per chunk.

    In a chunk that starts from S_0, with G the running sum of log decays,
    S_t = e^{G_t} S_0 + sum_{s<=t} e^{G_t-G_s} k_s u_s^T, and the u solve (I + A) U = b (V - e^G K S_0),
    A_ts = b_t e^{G_t-G_s} k_t.k_s for s < t (the WY form of arXiv 2406.06484).
    A reset (first token of a document) removes every term that would cross it.
    """
    n_tokens = q_BTHK.shape[1]
    size = min(chunk_size, n_tokens)
    pad = -n_tokens % size

    def chunks(x):  # (B, T, H, ...) -> (B, H, N, C, ...); padding has beta 0 and writes nothing
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
        return x.unflatten(1, (-1, size)).movedim(3, 1)

    q, k, v = chunks(q_BTHK), chunks(k_BTHK), chunks(v_BTHV)
    beta = chunks(beta_BTH)[..., None]
    total = chunks(log_decay_BTH).cumsum(-1)  # (B, H, N, C)
    from_start, to_end, last = total.exp(), (total[..., -1:] - total).exp(), total[..., -1].exp()
    pair = total[..., :, None] - total[..., None, :]
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if reset_BT is not None:
        segment = chunks(reset_BT[:, :, None].to(torch.int32)).cumsum(-1)  # documents started so far in the chunk
        causal = causal & (segment[..., :, None] == segment[..., None, :])
        from_start = from_start.masked_fill(segment > 0, 0.0)
        to_end = to_end.masked_fill(segment != segment[..., -1:], 0.0)
        last = last.masked_fill(segment[..., -1] > 0, 0.0)
    decay = pair.masked_fill(~causal, float("-inf")).exp()

    strict = (beta * decay * (k @ k.mT)).tril(-1)
    right = torch.cat([beta * v, beta * from_start[..., None] * k], dim=-1)
    solved = torch.linalg.solve_triangular(strict, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    k_to_end = (to_end[..., None] * k).mT

    state, starts, updates = state_BHKV, [], []
    # unbind: indexing would allocate a full-size gradient for every chunk.
    per_chunk = (u, w, k_to_end, last[..., None, None])
    for u_n, w_n, k_to_end_n, last_n in zip(*(x.unbind(2) for x in per_chunk), strict=True):
        starts.append(state)
        updates.append(u_n - w_n @ state)
        state = last_n * state + k_to_end_n @ updates[-1]
    u, start = torch.stack(updates, dim=2), torch.stack(starts, dim=2)
    out = (from_start[..., None] * q) @ start + (decay * (q @ k.mT)) @ u
    return out.movedim(1, 3).flatten(1, 2)[:, :n_tokens], state


def gated_delta_rule(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, state_BHKV, reset_BT, chunk_size, in_place=False):
    compute_dtype = torch.promote_types(q_BTGK.dtype, torch.float32)
    with torch.autocast(q_BTGK.device.type, enabled=False):
        q, k, v, log_decay, beta = (x.to(compute_dtype) for x in (q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH))
        if q.shape[2] != v.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
        given = state_BHKV
        if state_BHKV is None:
            state_BHKV = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        if q.shape[1] == 1:
            out, state = recurrent(q, k, v, log_decay, beta, state_BHKV, reset_BT)
        else:
            out, state = chunked(q, k, v, log_decay, beta, state_BHKV, reset_BT, chunk_size)
    return out.to(v_BTHV.dtype), given.copy_(state) if in_place else state
