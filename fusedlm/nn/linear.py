"""The bias-free projection that every layer is made of."""

import math

import torch


class Linear(torch.nn.Linear):
    """No bias; N(0, 1/fan_in), or zero for projections that write into the residual stream, so that every block
    starts as the identity."""

    def __init__(self, in_features: int, out_features: int, *, zero: bool = False):
        self.zero = zero
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        if self.weight.is_meta:  # drawing nothing takes milliseconds there, and who counts sizes builds many models
            return
        if self.zero:
            torch.nn.init.zeros_(self.weight)
        else:
            torch.nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_features))

    def flops(self, n_tokens: int) -> int:
        """Multiply-adds count two."""
        return 2 * self.in_features * self.out_features * n_tokens


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where that is on, else that of x: autocast has no list with operators of ours."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
