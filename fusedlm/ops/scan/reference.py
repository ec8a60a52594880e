"""h_t = (1 - g_t) h_{t-1} + u_t per channel in plain PyTorch, token by token and in blocks."""

import torch


def recurrent(keep_BTC, input_BTC, state_BC):
    """Token by token: the definition. keep is 1 - g."""
    outputs, state = [], state_BC
    for keep, new in zip(keep_BTC.unbind(1), input_BTC.unbind(1), strict=True):
        state = torch.addcmul(new, keep, state)
        outputs.append(state)
    return torch.stack(outputs, dim=1)


def blocked(keep_BTC, input_BTC, state_BC, block_size=8):
    """The same with O(T) work and block_size * log(T) sequential steps.

    All blocks are computed in parallel, each from a state of zero, with the running product of keep; the states that
    enter the blocks are again such a recurrence, over blocks. All factors are at most one and nothing is divided.
    """
    n_tokens = keep_BTC.shape[1]
    if n_tokens <= block_size:
        return recurrent(keep_BTC, input_BTC, state_BC)
    pad = (0, 0, 0, -n_tokens % block_size)  # at the end, and removed again
    keep, new = (
        torch.nn.functional.pad(x, pad).unflatten(1, (-1, block_size)).unbind(2) for x in (keep_BTC, input_BTC)
    )
    from_zero, product = [new[0]], [keep[0]]  # (B, N, C) per token of a block: from a state of zero, product of keep
    for i in range(1, block_size):
        from_zero.append(torch.addcmul(new[i], keep[i], from_zero[-1]))
        product.append(keep[i] * product[-1])
    ends = blocked(product[-1], from_zero[-1], state_BC, block_size)
    entering = torch.cat([state_BC[:, None], ends[:, :-1]], dim=1)
    states = torch.addcmul(torch.stack(from_zero, dim=2), torch.stack(product, dim=2), entering[:, :, None])
    return states.flatten(1, 2)[:, :n_tokens]


def gated_scan(gate_BTC, input_BTC, state_BC, reset_BT, in_place=False):
    compute_dtype = torch.promote_types(input_BTC.dtype, torch.float32)
    keep, new = 1 - gate_BTC.to(compute_dtype), input_BTC.to(compute_dtype)
    if reset_BT is not None:
        keep = keep.masked_fill(reset_BT[..., None], 0.0)
    if state_BC is None:
        state_BC = new.new_zeros(new.shape[0], new.shape[2])
    states = blocked(keep, new, state_BC)
    if in_place:
        return states, state_BC.copy_(states[:, -1])
    return states, states[:, -1].clone()  # a view would keep all the others alive
