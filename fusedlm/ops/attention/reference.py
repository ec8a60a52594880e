"""Softmax attention in plain PyTorch."""

import torch


def visibility_mask(visible_before_BT: torch.Tensor, n_keys: int, starts_B: torch.Tensor | None = None) -> torch.Tensor:
    """(B or 1, 1, T, S) bool: query t, which is key starts[b] + t (None: S - T + t), sees itself and the
    visible_before[t] keys before it."""
    n_queries = visible_before_BT.shape[1]
    query = torch.arange(n_queries, device=visible_before_BT.device)[None, :, None]
    query = query + (n_keys - n_queries if starts_B is None else starts_B[:, None, None])
    key = torch.arange(n_keys, device=visible_before_BT.device)
    return ((key <= query) & (key >= query - visible_before_BT[:, :, None]))[:, None]


def all_before(n_queries: int, n_keys: int, starts: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """(B or 1, T) visible_before of queries that see every earlier key."""
    query = torch.arange(n_queries, device=device)[None]
    return query + (n_keys - n_queries if starts is None else starts[:, None])


def attend(q_BTHD, k_BSGD, v_BSGE, scale: float, mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T scale) v with a boolean mask (B or 1, 1, T, S), in float32 or better; (B, T, H, E)."""
    dtype = q_BTHD.dtype
    compute_dtype = torch.promote_types(dtype, torch.float32)
    groups = q_BTHD.shape[2] // k_BSGD.shape[2]
    k = k_BSGD.repeat_interleave(groups, dim=2).to(compute_dtype)
    v = v_BSGE.repeat_interleave(groups, dim=2).to(compute_dtype)
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD.to(compute_dtype) * scale, k)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v).to(dtype)


def causal(q_BTHD, k_BTGD, v_BTGE, scale: float) -> torch.Tensor:
    n = q_BTHD.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool, device=q_BTHD.device).tril()
    return attend(q_BTHD, k_BTGD, v_BTGE, scale, mask[None, None])


def packed(q_BTHD, k_BTGD, v_BTGE, scale: float, positions_BT, window, boundaries=None) -> torch.Tensor:
    return attend(q_BTHD, k_BTGD, v_BTGE, scale, visibility_mask(visible_before(positions_BT, window), k_BTGD.shape[1]))


def visible_before(positions_BT: torch.Tensor, window: int | None) -> torch.Tensor:
    """(B or 1, T): how many earlier tokens each token sees, those of its document and at most window - 1."""
    return positions_BT if window is None else positions_BT.clamp(max=window - 1)
