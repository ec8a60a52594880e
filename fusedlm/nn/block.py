"""The pre-norm residual block."""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusedlm.nn.context import Context
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.mixers import MIXERS
from fusedlm.nn.module import Module, OpUse
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.report import Report, with_report


class Block(Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        *,
        dim: int,
        mixer: dict,
        ffn: dict,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        layer: int = 0,
        value_sources: set | None = None,
    ):
        """mixer, ffn: the keyword arguments of each and its `type`."""
        super().__init__()
        shared = {"dim": dim, "norm_eps": norm_eps, "layer": layer, "value_sources": value_sources}
        self.mixer_norm = RMSNorm(dim, norm_eps)
        self.mixer = MIXERS[mixer["type"]](**shared, **_without_type(mixer))
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.ffn = FFNS[ffn["type"]](dim=dim, **_without_type(ffn))
        self.dropout = torch.nn.Dropout(dropout)
        self.recomputes = False

    def forward(self, x_BTD: torch.Tensor, context: Context, state=None) -> tuple[torch.Tensor, Report]:
        if self.recomputes and state is None and torch.is_grad_enabled():
            mixed = checkpoint(
                lambda x: self._mix(x, context, None), x_BTD, use_reentrant=False, context_fn=_save_attention
            )
        else:
            mixed = self._mix(x_BTD, context, state)
        x_BTD = x_BTD + self.dropout(mixed)
        y, report = with_report(self.ffn(self.ffn_norm(x_BTD), context))
        return x_BTD + self.dropout(y), report

    def _mix(self, x_BTD: torch.Tensor, context: Context, state) -> torch.Tensor:
        fuses_norm = getattr(self.mixer, "fuses_norm", None)
        pending = fuses_norm is not None and fuses_norm(x_BTD)
        return self.mixer(self.mixer_norm(x_BTD, pending=pending), context, state)

    def recompute_mixer(self, recompute: bool = True) -> None:
        """See `Decoder.recompute_mixers`.

        Raises:
            ValueError: the mixer has a value residual, which passes values to later layers outside of its output.
        """
        if recompute and getattr(self.mixer, "value_residual", None) is not None:
            raise ValueError("runtime.recompute=mixer does not go with value_residual; turn one of them off")
        self.recomputes = recompute
        if hasattr(self.mixer, "recomputes_output"):
            # All of the mixer is recomputed already.
            self.mixer.recomputes_output = not recompute and type(self.mixer).recomputes_output

    def flops(self, n_tokens: int) -> int:
        return self.mixer.flops(n_tokens) + self.ffn.flops(n_tokens)

    def ops(self, device: torch.device) -> list[OpUse]:
        return [*self.mixer.ops(device), *self.ffn.ops(device)]


def _without_type(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name != "type"}


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


_save_attention = partial(create_selective_checkpoint_contexts, _policy)

# What costs more to recompute than to save.
_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
} | ({torch.ops.torch_attn._varlen_attn.default} if hasattr(torch.ops.torch_attn, "_varlen_attn") else set())
