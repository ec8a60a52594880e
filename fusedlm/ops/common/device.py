"""What kernels ask of the device they run on."""

import torch

_INTERPRETED = 3  # where there is no GPU; few, so that a program of a persistent kernel has several tiles


def n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count
