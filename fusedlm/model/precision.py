"""Device and dtype names of a recipe, resolved."""

import contextlib

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(name: str | torch.device) -> torch.device:
    """`auto` (cuda when there is one), `cpu` or `cuda`; a torch.device stays what it is.

    Raises:
        ValueError: the name is unknown, or cuda is requested where torch sees none.
    """
    kind = name.type if isinstance(name, torch.device) else name
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {kind!r} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if kind == "cuda" and not available:
        raise ValueError("device 'cuda' requested, but torch sees no CUDA device; use device cpu or auto")
    if isinstance(name, torch.device):
        return name
    return torch.device("cuda" if available and kind != "cpu" else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA devices and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision around forward and loss; a no-op for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
