"""What kernels ask of the device they run on."""

import torch

_INTERPRETED = 3  # where there is no GPU; few, so that a program of a persistent kernel has several tiles


def n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one in front of it has ended, and wait for its results by itself
    (CUDA's programmatic dependent launch: Hopper and later)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launched_early(device: torch.device) -> dict:
    """Launch options of a kernel with a constant OVERLAPPED, which says that it must wait."""
    return {"OVERLAPPED": True, "launch_pdl": True} if overlaps(device) else {"OVERLAPPED": False}
