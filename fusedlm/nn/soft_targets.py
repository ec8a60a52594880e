"""A teacher's distributions as targets of distillation, before its logits are computed."""

from typing import NamedTuple

import torch

from fusedlm.ops import SigmoidCap


class PendingLogits(NamedTuple):
    """Logits cap(x_ND weight_VD^T) of N tokens that were not computed; rows of the weight from n_classes on are
    padding."""

    x_ND: torch.Tensor
    weight_VD: torch.Tensor
    cap: float | SigmoidCap | None
    n_classes: int


class SoftTargets(NamedTuple):
    """Of distillation (Hinton et al., arXiv 1503.02531).

    logits: of the teacher, for the same tokens. temperature: of both distributions. weight: from 0 to 1, of the soft
    loss; that of the targets has the rest.
    """

    logits: PendingLogits
    temperature: float
    weight: float
