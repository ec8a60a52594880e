"""Projection and soft-capped cross entropy in plain PyTorch, with all logits at once."""

import torch.nn.functional as F

from fusedlm.ops.cross_entropy.reference import softcap_cross_entropy


def linear_softcap_cross_entropy(x, weight, targets, token_weights, cap, n_classes, z_loss):
    losses = softcap_cross_entropy(F.linear(x, weight.to(x.dtype)), targets, cap, n_classes, z_loss)
    total = losses.sum() * token_weights if token_weights.ndim == 0 else (losses * token_weights).sum()
    return total, losses.detach()
