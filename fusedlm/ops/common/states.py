"""States that ops overwrite."""

import torch


def check_in_place(state: torch.Tensor | None, like: torch.Tensor) -> None:
    """Raises ValueError unless the state of a call on tensors like this one can be overwritten."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if state is None or state.dtype != dtype or not state.is_contiguous():
        given = "None" if state is None else f"{state.dtype}{'' if state.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"in_place=True with state {given}; give a contiguous state of {dtype}")
    if torch.is_grad_enabled() and (state.requires_grad or like.requires_grad):
        raise ValueError("in_place=True overwrites a state that gradients need; leave it out or use torch.no_grad()")
