"""Linear attention with a scalar decay per head, in plain PyTorch, token by token and in chunks.

Per head, with a state S of (K, V):  S_t = a_t S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t  (arXiv 2405.21060, section 6).
G sets of q and k serve H value heads, H / G consecutive ones each.
"""

import torch


def recurrent(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT=None):
    """Token by token: the definition, and what decoding runs."""
    groups = q_BTGK.shape[2]
    outputs = []
    state = state_BHKV.unflatten(1, (groups, -1))  # (B, G, R, K, V)
    for t in range(q_BTGK.shape[1]):
        decay = log_decay_BTH[:, t].exp()
        if reset_BT is not None:
            decay = decay.masked_fill(reset_BT[:, t, None], 0.0)
        decay, v = (x.unflatten(1, (groups, -1)) for x in (decay, v_BTHV[:, t]))
        q, k = (x[:, t, :, None, :, None] for x in (q_BTGK, k_BTGK))
        state = state * decay[..., None, None] + k * v[..., None, :]
        outputs.append((state * q).sum(-2).flatten(1, 2))
    return torch.stack(outputs, dim=1), state.flatten(1, 2)


def chunked(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT=None, chunk_size=64):
    """The same with one sequential step per chunk, a decayed sum of states.

    In a chunk that starts from S_0, with L the running sum of log decays,
    o_t = e^{L_t} S_0^T q_t + sum_{s<=t} e^{L_t-L_s} (q_t.k_s) v_s, and the chunk ends with
    e^{L_C} S_0 + sum_s e^{L_C-L_s} k_s v_s^T: no exponent is positive.
    A reset (first token of a document) removes every term that would cross it.
    """
    n_tokens, groups = q_BTGK.shape[1:3]
    size = min(chunk_size, n_tokens)
    pad = -n_tokens % size

    def chunks(x):  # (B, T, heads, ...) -> (B, G, N, R, C, ...); padding has k = 0 and writes nothing
        if pad:
            x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
        x = x.unflatten(1, (-1, size)).unflatten(3, (groups, -1))
        return x.permute(0, 3, 1, 4, 2, *range(5, x.dim())).contiguous()

    q, k, v = chunks(q_BTGK).squeeze(3), chunks(k_BTGK).squeeze(3), chunks(v_BTHV)
    total = chunks(log_decay_BTH).cumsum(-1)  # (B, G, N, R, C)
    from_start, to_end, last = total.exp(), (total[..., -1:] - total).exp(), total[..., -1].exp()
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    if reset_BT is not None:
        segment = torch.nn.functional.pad(reset_BT.to(torch.int32), (0, pad))
        segment = segment.unflatten(1, (-1, size)).cumsum(-1)[:, None, :, None]  # documents started so far in the chunk
        causal = causal & (segment[..., :, None] == segment[..., None, :])
        from_start = from_start.masked_fill(segment > 0, 0.0)
        to_end = to_end.masked_fill(segment != segment[..., -1:], 0.0)
        last = last.masked_fill(segment[..., -1] > 0, 0.0)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()

    def fuse_heads(x):  # (B, G, N, R, C, V) -> (B, G, N, C, R V): one matrix product for the value heads of a group
        return x.transpose(3, 4).flatten(4)

    def split_heads(x):  # the inverse
        return x.unflatten(4, (-1, v.shape[-1])).transpose(3, 4)

    writes = split_heads(k.mT @ fuse_heads(to_end[..., None] * v))  # (B, G, N, R, K, V)
    state, starts = state_BHKV.unflatten(1, (groups, -1)), []
    # unbind: indexing would allocate a full-size gradient for every chunk.
    for decay_of_chunk, write in zip(last[..., None, None].unbind(2), writes.unbind(2), strict=True):
        starts.append(state)
        state = torch.addcmul(write, decay_of_chunk, state)
    start = torch.stack(starts, dim=2)
    inside = ((q @ k.mT)[:, :, :, None] * decay) @ v
    out = torch.addcmul(inside, from_start[..., None], split_heads(q @ fuse_heads(start)))
    return out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)[:, :n_tokens], state.flatten(1, 2)


def decayed_linear_attention(q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, state_BHKV, reset_BT, chunk_size, in_place=False):
    compute_dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    with torch.autocast(q_BTGK.device.type, enabled=False):
        q, k, v, log_decay = (x.to(compute_dtype) for x in (q_BTGK, k_BTGK, v_BTHV, log_decay_BTH))
        given = state_BHKV
        if state_BHKV is None:
            state_BHKV = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        if q.shape[1] == 1:
            out, state = recurrent(q, k, v, log_decay, state_BHKV, reset_BT)
        else:
            out, state = chunked(q, k, v, log_decay, state_BHKV, reset_BT, chunk_size)
    return out.to(v_BTHV.dtype), given.copy_(state) if in_place else state
