"""What tests of mixers against their definitions compare."""

from collections.abc import Callable

import torch


def output_and_gradients(mixer: torch.nn.Module, run: Callable, x: torch.Tensor, upstream: torch.Tensor) -> dict:
    """Of y = run(x): y, and the gradients of sum(y * upstream) by x and by every parameter of the mixer, by name."""
    mixer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    (y * upstream).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in mixer.named_parameters()}
