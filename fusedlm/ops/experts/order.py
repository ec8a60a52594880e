"""Slots sorted by expert, on the device: all shapes are static and the host waits for nothing."""

from typing import NamedTuple

import torch


class ExpertOrder(NamedTuple):
    """Slots sorted by expert. Slot n k + j is the j-th of the k slots of token n.

    The sort is stable: the rows of an expert are in the order of their tokens.
    """

    slots: torch.Tensor  # (N k,) int32: the slot of each sorted row
    rows: torch.Tensor  # (N k,) int32: the sorted row of each slot
    ends: torch.Tensor  # (E,) int32: the row after the last one of each expert; the last of them is N k


def sort_by_expert(indices_NK: torch.Tensor, n_experts: int) -> ExpertOrder:
    """Slots sorted by expert.

    Args:
        indices_NK: (N, k) int64 in [0, n_experts).
    """
    experts = indices_NK.flatten()
    sorted_experts, slots = torch.sort(experts, stable=True)
    rows = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    ends = torch.searchsorted(
        sorted_experts, torch.arange(n_experts, dtype=experts.dtype, device=slots.device), right=True, out_int32=True
    )
    return ExpertOrder(slots.int(), rows.int(), ends)


def count_tokens(indices_NK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """The number of tokens of each expert, without waiting for the device.

    Args:
        indices_NK: (N, k) int64 in [0, n_experts): the experts of each token.
        n_experts: E.

    Returns:
        (E,) int32.
    """
    experts = indices_NK.detach().flatten()
    counts = torch.zeros(n_experts, dtype=torch.int32, device=experts.device)
    return counts.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
