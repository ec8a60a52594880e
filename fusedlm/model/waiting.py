"""Whether the passes of a model can be captured in a CUDA graph."""

import torch

from fusedlm.nn.module import Module


def waiting_module(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[str, Module] | None:
    """The name of the first module that `waits_for_device`, and the module; None: there is none."""
    for name, module in model.named_modules():
        if isinstance(module, Module) and module.waits_for_device(device, dtype):
            return name, module
    return None
