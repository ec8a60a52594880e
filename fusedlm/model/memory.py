"""What training and quantised weights keep in memory, from shapes alone."""

import torch

from fusedlm.model.decoder import Decoder
from fusedlm.model.sharding import SHARDED_KINDS
from fusedlm.nn.block import Recompute
from fusedlm.nn.ffn.moe import MoE
from fusedlm.nn.ffn.relu2 import ReLU2
from fusedlm.nn.linear import Linear
from fusedlm.nn.module import parameters_by_kind
from fusedlm.nn.quantized import empty_weight, hidden_weights

_LOGITS = 298 * 2**20  # most bytes of logits at a time, of the chunked cross entropy


def activation_bytes(
    model: Decoder,
    n_tokens: int,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    divided: bool = False,
) -> int:
    """Bytes saved for backward in a forward pass over n_tokens, an estimate for compiled training with fused kernels.

    Every projection saves its input, and what follows it saves its output; attention also saves queries and keys after
    their norm and rotary embedding; linear-time mixers what the kernels of their recurrence save. Norms and elementwise
    work are recomputed.

    Args:
        n_tokens: of a micro-batch.
        dtype: of activations.
        recompute: as `runtime.recompute`: mixer saves only the input of each mixer and the output of its attention,
            block only the input of each block, and in the backward pass what one block at a time saves.
        divided: whether experts are divided over processes, which then save the rows that they receive; a process
            whose experts have more than the mean load saves more.
    """
    blocks = [_block(block, model, dtype, recompute == "mixer", divided) for block in model.all_blocks()]
    per_token = sum(blocks)
    if recompute == "block":
        per_token = len(blocks) * model.dim * dtype.itemsize + max(blocks)
    per_token += (2 * model.dim + _input_elements(model)) * dtype.itemsize  # embedding, and the input of the head
    # Embedding moved, concatenation of both norms, projection, and the input of the head.
    per_token += 5 * model.dim * len(model.mtp or ()) * dtype.itemsize
    logits = min(4 * n_tokens * model.embedding.weight.shape[0], _LOGITS)
    return round(n_tokens * per_token) + logits


def _block(block, model: Decoder, dtype: torch.dtype, recomputes_mixer: bool, divided: bool) -> float:
    """Bytes per token of a block."""
    mixer = _recomputed_mixer(block.mixer, dtype) if recomputes_mixer else _mixer(block.mixer, model.dim, dtype)
    n_bytes = mixer + (0 if block.ffn is None else _feed_forward(block.ffn, model.dim, dtype))
    n_bytes += len(block.parts()) * model.dim * (model.dropout.p > 0)  # masks, one byte per element
    if divided and isinstance(block.ffn, MoE) and block.ffn.n_experts:
        n_bytes += block.ffn.top_k * model.dim * dtype.itemsize
    return n_bytes


def weight_copy_bytes(model: Decoder, dtype: torch.dtype) -> int:
    """Bytes of the float32 weights' copies in the dtype of activations."""
    if dtype == torch.float32:
        return 0
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def held_fraction(model: Decoder, n_shards: int) -> float:
    """Of the parameters, and so of their gradients and optimizer state, what each of n_shards processes holds."""
    total = sum(parameter.numel() for parameter in model.parameters())
    sharded = sum(p.numel() for _, kind, p in parameters_by_kind(model) if kind in SHARDED_KINDS)
    return (total - sharded + sharded / n_shards) / total


def gathered_bytes(
    model: Decoder, dtype: torch.dtype, experts: int = 1, keeps_experts: bool = False, zero: int = 3
) -> int:
    """Bytes of what a process with sharded parameters gathers and reduces at a time: in the dtype of activations the
    parameters beside blocks, with their gradients, two blocks, since the next one is gathered ahead, and the gradients
    of one, twice in float32 while they are reduced.

    Args:
        experts: processes over which the experts of a layer are divided; one gathers its own alone.
        keeps_experts: whether a process keeps its own in the dtype of activations, since it holds them in full.
        zero: 2: all blocks are gathered, not two.
    """
    numbers = [sum(parameter.numel() for parameter in block.parameters()) for block in model.all_blocks()]
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(numbers)
    stacks = [_of_experts(block.ffn) for block in model.all_blocks()]
    own = [n // experts for n in stacks]
    reduced = max(n - all_experts + mine for n, all_experts, mine in zip(numbers, stacks, own, strict=True))
    gathered, kept = 2 * reduced, 0
    if keeps_experts:
        gathered, kept = 2 * max(n - all_experts for n, all_experts in zip(numbers, stacks, strict=True)), sum(own)
    if zero == 2:
        gathered, kept = sum(numbers) - sum(stacks), sum(own)
    return dtype.itemsize * (2 * rest + gathered + kept + reduced) + 2 * 4 * reduced


def _of_experts(ffn) -> int:
    """Parameters of the routed experts of a feed-forward."""
    return ffn.n_experts * ffn.experts.parameters_of_one() if isinstance(ffn, MoE) and ffn.n_experts else 0


def quantized_bytes(model: Decoder, format: str) -> int:
    """Bytes of the parameters with hidden matrices and experts in a format of `quantize_weight`, in its default groups,
    and the others in float32."""
    weights = hidden_weights(model).values()
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(weight.numel() for weight in weights)
    return 4 * others + sum(empty_weight(weight, format, None).nbytes for weight in weights)


def _input_elements(model: Decoder) -> int:
    """Elements per token that the parts beside the embedding save. Skips and x0 are saved as inputs of blocks."""
    bigram = 0 if model.bigram is None else model.bigram.project.in_features + model.dim
    smear = 0 if model.smear is None else 2 * model.dim
    values = 0 if model.value_table is None else model.value_table.embedding_dim
    return bigram + smear + values


def _mixer(mixer, dim: int, dtype: torch.dtype) -> float:
    """Bytes per token of a mixer."""
    return _linears(mixer, dim, dtype) + dtype.itemsize * mixer.saved_elements()


def _recomputed_mixer(mixer, dtype: torch.dtype) -> float:
    """Bytes per token of the input of a mixer and of what its attention returns, which is not recomputed."""
    dim, attention = mixer.out.out_features, mixer.out.in_features * getattr(mixer, "n_streams", 1)
    return dtype.itemsize * (dim + (0 if hasattr(mixer, "chunk_size") else attention))


def _feed_forward(ffn, dim: int, dtype: torch.dtype) -> float:
    """Bytes per token of a feed-forward. Squared ReLU saves one matrix of its hidden layer."""
    once = sum(part.up.out_features for part in ffn.modules() if isinstance(part, ReLU2))
    experts = ffn.saved_elements() if hasattr(ffn, "saved_elements") else 0
    return _linears(ffn, dim, dtype) + dtype.itemsize * (experts - once)


def _linears(part: torch.nn.Module, dim: int, dtype: torch.dtype) -> int:
    """Bytes per token of the inputs and outputs of the projections of a part; the input of the part counts once."""
    elements, reads_input = 0, False
    for module in part.modules():
        if isinstance(module, Linear):
            writes = module is getattr(part, "out", None)
            reads_input |= module.in_features == dim and not writes
            elements += module.out_features + (module.in_features if writes or module.in_features != dim else 0)
    return dtype.itemsize * (elements + dim * reads_input)
