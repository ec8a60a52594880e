"""The pre-norm residual block."""

from functools import partial

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.nn.context import Context
from fusedlm.nn.ffn import FFNS
from fusedlm.nn.mixers import MIXERS
from fusedlm.nn.norm import RMSNorm, project_normed
from fusedlm.ops.common import Choice, Setting
from fusedlm.ops.rmsnorm_linear.op import RMSNORM_LINEAR


class Block(torch.nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: BlockConfig, model: ModelConfig, setting: Setting, layer: int):
        super().__init__()
        self.mixer_norm = RMSNorm(model.dim, model.norm_eps)
        self.mixer = MIXERS[config.mixer.type](config.mixer, model, setting, layer)
        self.normed_input: Choice | None = None
        if (projection := getattr(self.mixer, "input_projection", None)) is not None:
            features = {"in_features": projection.in_features, "out_features": projection.out_features}
            self.normed_input = RMSNORM_LINEAR.choose(model.impl.rmsnorm_linear, setting, **features)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps)
        self.ffn = FFNS[config.ffn.type](config.ffn, model, setting)
        self.dropout = torch.nn.Dropout(model.dropout)
        self.recomputes = False

    @property
    def choices(self) -> list[Choice]:
        return [*self.mixer.choices, *([] if self.normed_input is None else [self.normed_input]), *self.ffn.choices]

    def forward(self, x_BTD: torch.Tensor, context: Context, state=None) -> torch.Tensor:
        mixed = self._mix_again(x_BTD, context) if self._recomputing(state) else self._mix(x_BTD, context, state)
        x_BTD = x_BTD + self.dropout(mixed)
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))

    def recompute_mixer(self) -> None:
        """See `Decoder.recompute_mixers`.

        Raises:
            ValueError: the mixer has a value residual, whose values leave it other than as its output.
        """
        if getattr(self.mixer, "value_residual", None) is not None:
            raise ValueError("train.recompute=mixer does not go with value_residual; turn one of them off")
        self.recomputes = True
        self.mixer.computes_end_again = False  # it is computed again with all the rest

    def _recomputing(self, state) -> bool:
        return self.recomputes and state is None and torch.is_grad_enabled()

    def _mix(self, x_BTD: torch.Tensor, context: Context, state) -> torch.Tensor:
        if self.normed_input is None:
            return self.mixer(self.mixer_norm(x_BTD), context, state)
        projected = project_normed(x_BTD, self.mixer_norm, self.mixer.input_projection, self.normed_input)
        return self.mixer.mix(projected, context, state)

    def _mix_again(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        return checkpoint(lambda x: self._mix(x, context, None), x_BTD, use_reentrant=False, context_fn=_keep_attention)

    def flops(self, n_tokens: int) -> int:
        return self.mixer.flops(n_tokens) + self.ffn.flops(n_tokens)


def _keep(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


_keep_attention = partial(create_selective_checkpoint_contexts, _keep)

# What costs more to compute again than to keep.
_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
} | ({torch.ops.torch_attn._varlen_attn.default} if hasattr(torch.ops.torch_attn, "_varlen_attn") else set())
