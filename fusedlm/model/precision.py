"""Device and dtype names of a recipe, resolved."""

import contextlib

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` (cuda when there is one), `cpu`, `cuda` or `cuda:N`; or a torch.device of these.

    Raises:
        ValueError: the name is unknown, or torch sees no such CUDA device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not one of auto, cpu, cuda, cuda:N")
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device '{found}' requested, but torch sees no CUDA device; use device cpu or auto")
    if found.index is not None and found.index >= torch.cuda.device_count():
        names = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        raise ValueError(f"device '{found}' requested, but torch sees only {names}")
    return found


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA devices and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision around forward and loss (none for float32), with `device` as the current one: Triton launches its
    kernels there, wherever the tensors are."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype))
        yield
