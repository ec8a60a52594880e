"""Projection and soft-capped cross entropy in plain PyTorch, all logits at once."""

import torch.nn.functional as F

from fusedlm.ops.softcap_cross_entropy.reference import softcap_cross_entropy


def linear_softcap_cross_entropy(x, weight, targets, token_weights, cap, n_classes, z_loss):
    losses = softcap_cross_entropy(F.linear(x, weight.to(x.dtype)), targets, cap, n_classes, z_loss)
    return (losses * token_weights).sum(), losses.detach()
