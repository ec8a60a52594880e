"""The short causal convolution in plain PyTorch."""

import torch
import torch.nn.functional as F

EPS = 1e-6  # of the L2 norm


def short_conv(
    x_BTC, weight_SC, tail_BSC, positions_BT, lengths_B, silu: bool, widths, head_dim: int, head_scales
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    compute_dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    x, weight = x_BTC.to(compute_dtype), weight_SC.to(compute_dtype)
    n_tokens, n_before = x.shape[1], len(weight) - 1
    if tail_BSC is None:
        tail_BSC = x_BTC.new_zeros(len(x), n_before, x.shape[2])
    inputs = torch.cat([tail_BSC.to(compute_dtype), x], dim=1)
    y = inputs[:, n_before:] * weight[0]
    for back in range(1, len(weight)):
        tap = inputs[:, n_before - back : n_before - back + n_tokens] * weight[back]
        if positions_BT is not None:
            tap = tap * (positions_BT >= back)[..., None]
        y = y + tap
    if silu:
        y = F.silu(y)
    parts = list(y.split(list(widths), dim=-1))
    for i, scale in enumerate(head_scales):
        heads = parts[i].unflatten(-1, (-1, head_dim))
        parts[i] = (heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + EPS) * scale).flatten(-2)
    return tuple(part.to(x_BTC.dtype) for part in parts), next_tail(x_BTC, tail_BSC, n_before, lengths_B)


def next_tail(x_BTC, tail_BSC, n_before: int, lengths_B) -> torch.Tensor:
    """The last n_before of the inputs tail (None: zeros) and x, of which row b has only lengths_B[b] (None: all). It
    shares no memory with them."""
    batch, n_tokens, channels = x_BTC.shape
    if lengths_B is None and n_tokens >= n_before:
        return x_BTC[:, n_tokens - n_before :].clone(memory_format=torch.contiguous_format)
    if tail_BSC is None:
        tail_BSC = x_BTC.new_zeros(batch, n_before, channels)
    first = n_tokens if lengths_B is None else lengths_B[:, None]
    index = first + torch.arange(n_before, device=x_BTC.device).expand(batch, -1)  # in tail and x, concatenated

    def rows(source, at):
        return source.gather(1, at[..., None].expand(-1, -1, channels)) if source.shape[1] else source.new_zeros(())

    of_tail, of_x = rows(tail_BSC, index.clamp(max=n_before - 1)), rows(x_BTC, (index - n_before).clamp(min=0))
    return torch.where((index < n_before)[..., None], of_tail, of_x)
