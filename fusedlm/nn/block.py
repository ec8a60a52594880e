"""The pre-norm residual block."""

from functools import partial
from typing import Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusedlm.nn.context import Context
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.low_precision import low_precision_layers
from fusedlm.nn.mixers import MIXERS
from fusedlm.nn.module import Constant, Module, OpUse, Role
from fusedlm.nn.norm import RMSNorm
from fusedlm.nn.pending import PendingMix, PendingNorm, PendingProduct
from fusedlm.nn.quantized import quantized_layers
from fusedlm.nn.report import Report, with_report
from fusedlm.ops.common import runs_fused

Recompute = Literal["none", "mixer", "block"]  # what the backward pass recomputes


class Block(Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); the second only where the block has a feed-forward.

    With `takes_skip` x is first x + skip_weight * skip, the output of an earlier block; with `mixes_x0` it is then
    mix_x * x + mix_x0 * x0, x0 the input of the first block; None in that block, where it is x. The factors are
    vectors over dimensions.
    """

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
        depth_scaled_norms: bool = False,
        norm_gain: bool = True,
        mixes_x0: bool = False,
        takes_skip: bool = False,
    ):
        """mixer, ffn: the keyword arguments of each and its `type`; that of ffn is none where there is none.
        depth_scaled_norms: the outputs of both norms are multiplied by 1 / sqrt(layer + 1). norm_gain: whether both
        have gains."""
        super().__init__()
        shared = {"dim": dim, "norm_eps": norm_eps, "layer": layer, "value_sources": value_sources}
        norm_scale = (layer + 1) ** -0.5 if depth_scaled_norms else None
        self.mixes_x0, self.takes_skip = mixes_x0, takes_skip
        if takes_skip:
            self.add_parameter("skip_weight", (dim,), Role("gate"), Constant(1.0))
        if mixes_x0:
            self.add_parameter("mix_x", (dim,), Role("gate"), Constant(1.0))
            self.add_parameter("mix_x0", (dim,), Role("gate"), Constant(0.0))
        self.mixer_norm = RMSNorm(dim, norm_eps, norm_scale, has_gain=norm_gain)
        self.mixer = MIXERS[mixer["type"]](**shared, **_without_type(mixer))
        self.ffn_norm = self.ffn = None
        if ffn["type"] != "none":
            self.ffn_norm = RMSNorm(dim, norm_eps, norm_scale, has_gain=norm_gain)
            self.ffn = FFNS[ffn["type"]](dim=dim, **_without_type(ffn))
        self.dropout = torch.nn.Dropout(dropout)
        self.recomputes_mixer = self.recomputes_block = False
        self.branch_scale = 1.0  # factor of both branches (`fusedlm.nn.mup`)
        for part in self.parts():
            if part.branch_end is not None:
                getattr(part, part.branch_end).ends_branch = True

    def forward(
        self,
        x_BTD: torch.Tensor,
        context: Context,
        state=None,
        x0_BTD: torch.Tensor | None = None,
        skip_BTD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Report]:
        if self.recomputes_block and state is None and torch.is_grad_enabled():
            inputs = x_BTD, context, None, x0_BTD, skip_BTD
            return checkpoint(self._compute, *inputs, use_reentrant=False, preserve_rng_state=self.dropout.p > 0)
        return self._compute(x_BTD, context, state, x0_BTD, skip_BTD)

    def _compute(self, x_BTD, context: Context, state, x0_BTD, skip_BTD) -> tuple[torch.Tensor, Report]:
        x_BTD, normed = self._input(x_BTD, x0_BTD, skip_BTD)
        is_normed = normed is not None
        mixer_input = normed if is_normed else x_BTD
        if self.recomputes_mixer and state is None and torch.is_grad_enabled():
            mixed = checkpoint(
                lambda x: self._mix(x, is_normed, context, None),
                mixer_input,
                use_reentrant=False,
                context_fn=_save_attention,
            )
        else:
            mixed = self._mix(mixer_input, is_normed, context, state)
        x_BTD = self._add(x_BTD, mixed)
        if self.ffn is None:
            return x_BTD, Report({}, {})
        y, report = with_report(self.ffn(self._normed(self.ffn_norm, x_BTD, self.ffn), context))
        return self._add(x_BTD, y), report

    def _input(self, x_BTD, x0_BTD, skip_BTD) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input after mixing, and the mixer's norm of it where one op computes both."""
        if not (self.mixes_x0 or self.takes_skip):
            return x_BTD, None
        mix_x = mix_x0 = skip_weight = None
        if self.mixes_x0 and x0_BTD is None:
            # Of one tensor one product: gradients then add up in the same order whatever wraps the block.
            mix_x = self.mix_x + self.mix_x0
        elif self.mixes_x0:
            mix_x, mix_x0 = self.mix_x, self.mix_x0
        if self.takes_skip:
            skip_weight = self.skip_weight
        mix = PendingMix(x_BTD, mix_x, x0_BTD, mix_x0, skip_BTD, skip_weight)
        is_fused = runs_fused("mix_inputs", self.backend("mix_inputs"), x_BTD, width=x_BTD.shape[-1])
        if is_fused and not _fuses_norm(self.mixer, x_BTD):
            return self.mixer_norm(mix)
        return mix.compute(), None

    def _mix(self, x_BTD: torch.Tensor, is_normed: bool, context: Context, state) -> torch.Tensor:
        """The mixer's output; is_normed: x is its input after the norm."""
        return self.mixer(x_BTD if is_normed else self._normed(self.mixer_norm, x_BTD, self.mixer), context, state)

    @staticmethod
    def _normed(norm: RMSNorm, x_BTD: torch.Tensor, part: torch.nn.Module) -> torch.Tensor | PendingNorm:
        return norm(x_BTD, pending=_fuses_norm(part, x_BTD))

    def _add(self, x_BTD: torch.Tensor, y_BTD: torch.Tensor | PendingProduct) -> torch.Tensor:
        if self.branch_scale != 1.0:
            y_BTD = y_BTD.compute() if isinstance(y_BTD, PendingProduct) else y_BTD
            return torch.add(x_BTD, self.dropout(y_BTD), alpha=self.branch_scale)
        if not isinstance(y_BTD, PendingProduct):
            return x_BTD + self.dropout(y_BTD)
        if self.training and self.dropout.p:
            return x_BTD + self.dropout(y_BTD.compute())
        return y_BTD.compute(x_BTD, x_BTD.dtype)

    def parts(self) -> list[Module]:
        """The mixer, and the feed-forward if there is one."""
        return [self.mixer] if self.ffn is None else [self.mixer, self.ffn]

    def recompute(self, what: Recompute) -> None:
        """See `Decoder.recompute`.

        Raises:
            ValueError: the mixer has a value residual, which passes values to later layers outside of its output.
        """
        if what != "none" and getattr(self.mixer, "value_residual", None) is not None:
            raise ValueError(f"runtime.recompute={what} does not go with value_residual; turn one of them off")
        self.recomputes_mixer, self.recomputes_block = what == "mixer", what == "block"
        if hasattr(self.mixer, "recomputes_output"):
            # All of the mixer is recomputed already.
            self.mixer.recomputes_output = what == "none" and type(self.mixer).recomputes_output

    def flops(self, n_tokens: int) -> int:
        return sum(part.flops(n_tokens) for part in self.parts())

    def ops(self, device: torch.device) -> list[OpUse]:
        used = [use for part in self.parts() for use in part.ops(device)]
        used.append(OpUse("token_linear", "token_linear", {}))
        if self.mixes_x0 or self.takes_skip:
            used.append(OpUse("mix_inputs", "mix_inputs", {"width": self.mixer_norm.dim}))
        if quantized_layers(self):
            used.append(OpUse("quantized_linear", "quantized_linear", {}))
        used += [layer.op() for layer in low_precision_layers(self).values()][:1]
        return used


def _fuses_norm(part: torch.nn.Module, x_BTD: torch.Tensor) -> bool:
    """Whether a mixer or feed-forward computes the norm of its input x itself."""
    fuses_norm = getattr(part, "fuses_norm", None)
    return fuses_norm is not None and fuses_norm(x_BTD)


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
