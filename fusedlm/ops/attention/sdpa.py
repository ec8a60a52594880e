"""Softmax attention by torch's scaled_dot_product_attention and its variable-length kernel."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedlm.ops.attention.reference import all_before, visibility_mask, visible_before

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a torch built without it
    varlen_attn = None


def one_width(q, k, v) -> list[torch.Tensor]:
    """q, k and v zero-padded to one head dimension, for kernels that need it: zero columns add nothing to scores and
    give zero output columns."""
    width = max(q.shape[-1], v.shape[-1])
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v)]


def _sdpa_padded(q_BTHD, k_BSGD, v_BSGE, scale, **options):
    """On the CPU torch's flash kernel needs keys and values of one dimension; the fallback materializes all scores and
    is three times slower at 1024 tokens."""
    value_dim = v_BSGE.shape[-1]
    if q_BTHD.device.type == "cpu":
        q_BTHD, k_BSGD, v_BSGE = one_width(q_BTHD, k_BSGD, v_BSGE)
    return _sdpa(q_BTHD, k_BSGD, v_BSGE, scale, **options)[..., :value_dim]


def _sdpa(q_BTHD, k_BSGD, v_BSGE, scale, mask=None, is_causal=False):
    # A branch, for in a graph with symbolic numbers of heads torch refuses the comparison itself.
    grouped = {"enable_gqa": True} if q_BTHD.shape[2] != k_BSGD.shape[2] else {}
    out = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGE.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        **grouped,
    )
    return out.transpose(1, 2)


def causal(q_BTHD, k_BTGD, v_BTGE, scale: float) -> torch.Tensor:
    """By the backend that torch selects."""
    return _sdpa_padded(q_BTHD, k_BTGD, v_BTGE, scale, is_causal=True)


def cudnn_causal(q_BTHD, k_BTGD, v_BTGE, scale: float) -> torch.Tensor:
    if q_BTHD.shape[1] == 1:  # cuDNN rejects a single key
        return causal(q_BTHD, k_BTGD, v_BTGE, scale)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BTHD, k_BTGD, v_BTGE, scale, is_causal=True)


def flash_causal(q_BTHD, k_BTGD, v_BTGE, scale: float) -> torch.Tensor:
    value_dim = v_BTGE.shape[-1]
    q_BTHD, k_BTGD, v_BTGE = one_width(q_BTHD, k_BTGD, v_BTGE)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q_BTHD, k_BTGD, v_BTGE, scale, is_causal=True)[..., :value_dim]


def flash_packed(q_BTHD, k_BTGD, v_BTGE, scale: float, positions_BT, window, boundaries) -> torch.Tensor:
    """By the variable-length kernel, without a mask. boundaries: (cumulative lengths (N + 1,) int32, longest)."""
    batch, n_tokens, n_heads, _ = q_BTHD.shape
    if boundaries is None:
        boundaries = varlen_boundaries(positions_BT.expand(batch, -1))
    cumulative, longest = boundaries
    value_dim = v_BTGE.shape[-1]
    if k_BTGD.shape[2] != n_heads:  # torch 2.11's kernel has no grouped queries
        k_BTGD, v_BTGE = (x.repeat_interleave(n_heads // x.shape[2], dim=2) for x in (k_BTGD, v_BTGE))
    q, k, v = (x.reshape(batch * n_tokens, n_heads, -1) for x in one_width(q_BTHD, k_BTGD, v_BTGE))
    out = varlen_attn(
        q,
        k,
        v,
        cumulative,
        cumulative,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return out.view(batch, n_tokens, n_heads, -1)[..., :value_dim]


def packed(q_BTHD, k_BTGD, v_BTGE, scale: float, positions_BT, window, boundaries=None) -> torch.Tensor:
    """With a mask. A window much shorter than the sequence is computed in blocks, whose masks are window x 2 window."""
    n_tokens = q_BTHD.shape[1]
    visible_before_BT = visible_before(positions_BT, window)
    if window is None or n_tokens <= 2 * window:
        return _sdpa_padded(q_BTHD, k_BTGD, v_BTGE, scale, mask=visibility_mask(visible_before_BT, n_tokens))
    batch = q_BTHD.shape[0]
    pad = -n_tokens % window
    n_blocks = (n_tokens + pad) // window

    def queries(x):
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
        return x.reshape(x.shape[0] * n_blocks, window, *x.shape[2:])

    def keys(x):  # each block of queries sees its own block of keys and the previous one
        x = F.pad(x, (0, 0, 0, 0, window, pad)).unflatten(1, (n_blocks + 1, window))
        return torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1)

    mask = visibility_mask(queries(visible_before_BT.expand(batch, -1)), 2 * window)
    out = _sdpa_padded(queries(q_BTHD), keys(k_BTGD), keys(v_BTGE), scale, mask=mask)
    return out.unflatten(0, (batch, n_blocks)).flatten(1, 2)[:, :n_tokens]


def varlen_boundaries(positions_BT: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cumulative document lengths over all rows, and an upper bound of the longest. Padded with empty documents to a
    multiple of 64, so that there are few shapes. Synchronizes with the device."""
    starts = (positions_BT.flatten() == 0).nonzero().flatten()
    cumulative = torch.full((-(-(starts.numel() + 1) // 64) * 64,), positions_BT.numel(), device=positions_BT.device)
    cumulative[: starts.numel()] = starts
    return cumulative.to(torch.int32), positions_BT.shape[1]


def cached(q_BTHD, k_BSGD, v_BSGE, scale: float, visible_before_BT, starts_B=None) -> torch.Tensor:
    """The query heads of a group are folded into the query axis, so that keys are read once."""
    batch, n_queries, n_heads, _ = q_BTHD.shape
    groups = k_BSGD.shape[2]
    q = q_BTHD.unflatten(2, (groups, -1)).transpose(2, 3).flatten(1, 2)
    mask = None
    if visible_before_BT is None and (n_queries > 1 or starts_B is not None):
        visible_before_BT = all_before(n_queries, k_BSGD.shape[1], starts_B, q.device)
    if visible_before_BT is not None:
        mask = visibility_mask(visible_before_BT, k_BSGD.shape[1], starts_B).repeat_interleave(n_heads // groups, dim=2)
    out = _sdpa(q, k_BSGD, v_BSGE, scale, mask=mask)
    return out.unflatten(1, (n_queries, -1)).transpose(2, 3).reshape(batch, n_queries, n_heads, -1)
