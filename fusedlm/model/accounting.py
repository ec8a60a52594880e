"""What a model costs: parameters, FLOPs, bytes of decoding state."""

from dataclasses import dataclass

import torch

from fusedlm.model.decoder import Decoder


@dataclass(frozen=True)
class ParameterCount:
    """total: all, shared ones once. active: those that a token uses, without the experts that it does not; where tokens
    differ in number, on average (routed feed-forwards: at their budget). embedding: the token table. mtp: the
    modules of multi-token prediction, which plain decoding does not use; among the total and the active ones."""

    total: int
    active: int
    embedding: int
    mtp: int = 0


def count_parameters(model: Decoder) -> ParameterCount:
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        sum(parameter.numel() for parameter in module.parameters()) - module.active_parameters()
        for module in model.modules()
        if hasattr(module, "active_parameters")
    )
    further = 0 if model.mtp is None else sum(parameter.numel() for parameter in model.mtp.parameters())
    return ParameterCount(
        total=total, active=total - idle, embedding=model.embedding.weight.numel(), mtp=further
    )


def forward_flops(model: Decoder, n_tokens: int) -> int:
    """Matrix-multiply FLOPs of a forward pass over one sequence, by the definition of each part and whatever backend
    computes it: a multiply-add is two; causal attention counts in full (PaLM, arXiv 2204.02311, appendix B), with a
    window as that many keys per token; linear-time mixers count the products of their recurrence, token by token, so
    that neither chunks nor solves enter; elementwise work and padding do not count. Routed feed-forwards count at their
    budget, whatever they last ran; mixtures of experts count the experts that a token uses. Multi-token
    prediction does not count: it is a part of training alone."""
    embedded = 0 if model.bigram is None else model.bigram.flops(n_tokens)
    return embedded + sum(block.flops(n_tokens) for block in model.blocks) + model.head.flops(n_tokens)


def training_flops_per_token(model: Decoder, seq_len: int) -> float:
    """Forward and backward, the backward at twice the forward; recomputation does not count. Each module of multi-token
    prediction counts with a pass of the head, at every position."""
    further = sum(module.flops(seq_len) + model.head.flops(seq_len) for module in model.mtp or ())
    return 3 * (forward_flops(model, seq_len) + further) / seq_len


def state_bytes(model: Decoder, n_tokens: int, dtype: torch.dtype) -> int:
    """Decoding state of one sequence after n_tokens, activations in dtype."""
    parts = [*model.input_parts(), *(block.mixer for block in model.blocks)]
    return sum(part.state_bytes(n_tokens, dtype) for part in parts)
