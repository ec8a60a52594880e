"""Device properties that decide how kernels are launched."""

import importlib.util

import torch

_INTERPRETED_MULTIPROCESSORS = 3  # without a GPU; few, so that a program of a persistent kernel gets several tiles


def n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports_pdl(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch (PDL: CUDA on Hopper and later), by which a kernel starts
    before the previous one has ended and waits for its results itself."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(device: torch.device) -> dict:
    """Launch options of a kernel that starts by PDL where the device supports it. The kernel's constant PDL says
    whether it must wait for the previous kernel."""
    return {"PDL": True, "launch_pdl": True} if supports_pdl(device) else {"PDL": False}


def can_run_triton(tensor: torch.Tensor) -> bool:
    """Whether elementwise kernels of ours run on a tensor: float32 on a CUDA device, Triton installed."""
    if tensor.device.type != "cuda" or tensor.dtype != torch.float32:
        return False
    return importlib.util.find_spec("triton") is not None
