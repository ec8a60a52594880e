"""Softmax attention written out, the truth that the other implementations are measured against."""

import torch


def reach_mask(reach_BT: torch.Tensor, n_keys: int) -> torch.Tensor:
    """(B or 1, 1, T, S) bool: query t, token S - T + t of all, sees itself and the reach[t] tokens before it."""
    n_queries = reach_BT.shape[1]
    query = torch.arange(n_keys - n_queries, n_keys, device=reach_BT.device)[:, None]
    key = torch.arange(n_keys, device=reach_BT.device)[None, :]
    return ((key <= query) & (key >= query - reach_BT[:, :, None]))[:, None]


def attend(q_BTHD, k_BSGD, v_BSGE, scale: float, mask: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T scale) v with a boolean mask (B or 1, 1, T, S), in float32 or better; (B, T, H, E)."""
    dtype = q_BTHD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    groups = q_BTHD.shape[2] // k_BSGD.shape[2]
    k = k_BSGD.repeat_interleave(groups, dim=2).to(wide)
    v = v_BSGE.repeat_interleave(groups, dim=2).to(wide)
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD.to(wide) * scale, k)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v).to(dtype)


def causal(q_BTHD, k_BTGD, v_BTGE, scale: float) -> torch.Tensor:
    n = q_BTHD.shape[1]
    mask = torch.ones(n, n, dtype=torch.bool, device=q_BTHD.device).tril()
    return attend(q_BTHD, k_BTGD, v_BTGE, scale, mask[None, None])


def packed(q_BTHD, k_BTGD, v_BTGE, scale: float, positions_BT, window, boundaries=None) -> torch.Tensor:
    return attend(q_BTHD, k_BTGD, v_BTGE, scale, reach_mask(reach(positions_BT, window), k_BTGD.shape[1]))


def reach(positions_BT: torch.Tensor, window: int | None) -> torch.Tensor:
    """How many earlier tokens each token sees: those of its document, and at most window - 1."""
    return positions_BT if window is None else positions_BT.clamp(max=window - 1)
