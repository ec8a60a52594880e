"""Soft-target distillation in plain PyTorch, with all logits at once."""

import torch.nn.functional as F

from fusedlm.ops.cross_entropy.reference import IGNORE_INDEX, softcap


def linear_distillation(
    x, weight, targets, token_weights, teacher_x, teacher_weight, cap, teacher_cap, n_classes, temperature
):
    log_p, log_q = (
        (softcap(F.linear(h, w.to(h.dtype)), c)[:, :n_classes] / temperature).log_softmax(-1)
        for h, w, c in ((x, weight, cap), (teacher_x, teacher_weight, teacher_cap))
    )
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1).masked_fill(targets == IGNORE_INDEX, 0.0)
    return temperature**2 * (divergence * token_weights).sum(), divergence.detach()
