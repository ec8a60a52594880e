"""Routed experts with weights in few bits in Triton: up-projection and activation, down-projection, and for several
tokens the sum of each token's outputs, in a fixed order. Nothing is sorted, and nothing waits for the host."""

import torch
import triton

from fusedlm.ops.common.device import pdl_options
from fusedlm.ops.experts.triton import routed_experts
from fusedlm.ops.quantized.products import KINDS
from fusedlm.ops.quantized.reference import QuantizedWeight
from fusedlm.ops.quantized_moe import kernels
from fusedlm.ops.quantized_moe.reference import decoded

TOKENS, CHOICES, SLOTS = 32, 32, 256  # at most: tokens, experts of each, and pairs of both


def one_token_config(row_bytes: int) -> dict:
    """Tile and launch options of a product of one token with rows of so many bytes."""
    units = min(triton.next_power_of_2(max(1, triton.cdiv(row_bytes, 16))), 64)
    return {"ROWS": 4, "UNITS": units, "num_warps": max(1, units // 32)}


def several_tokens_config(n_tokens: int, row_bytes: int, dtype: torch.dtype) -> dict:
    """Those of several tokens, for all of which the tile has room. 64 or 128 bytes of each row at a time: rows of
    experts are short, and with more a program of 16 tokens and four bits has too few registers."""
    halves = 32 if row_bytes % 128 and row_bytes % 64 == 0 else 64
    if dtype != torch.bfloat16:
        return {"ROWS": 64, "HALVES": 32, "TOKENS": 32, "num_warps": 4, "num_stages": 4}
    if n_tokens <= 16:
        return {"ROWS": 32, "HALVES": halves, "TOKENS": 16, "num_warps": 2, "num_stages": 3}
    return {"ROWS": 64, "HALVES": halves, "TOKENS": 32, "num_warps": 4, "num_stages": 3}


def run(
    x, up: QuantizedWeight, down: QuantizedWeight, indices, weights, activation: str, slope: float,
    configs: tuple[dict, dict] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch the kernels. configs: of up and down, instead of those above."""
    (n_tokens, dim), top_k, hidden = x.shape, indices.shape[1], down.width
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.contiguous()
    a = torch.empty(n_tokens * top_k, hidden, dtype=x.dtype, device=x.device)
    out = torch.empty(n_tokens, dim, dtype=x.dtype, device=x.device)
    swiglu, pdl = activation == "swiglu", pdl_options(x.device)
    rows_of_a = 2 if swiglu else 1
    sizes = [weight.codes.shape[1] for weight in (up, down)]
    if n_tokens == 1:
        up_config, down_config = configs or map(one_token_config, sizes)
        arguments, constants = _one_token(up, up_config)
        kernels.one_token_up_kernel[(triton.cdiv(rows_of_a * hidden, up_config["ROWS"]), top_k)](
            x, *arguments, indices, a, slope, hidden, dim, n_groups=up.scales.shape[1], SWIGLU=swiglu,
            **constants, **pdl,
        )  # fmt: skip
        arguments, constants = _one_token(down, down_config)
        kernels.one_token_down_kernel[(triton.cdiv(dim, down_config["ROWS"]),)](
            a, *arguments, indices, weights, out, dim, hidden, n_groups=down.scales.shape[1], TOP_K=top_k,
            **constants, **pdl,
        )  # fmt: skip
        return out
    up_config, down_config = configs or (several_tokens_config(n_tokens, size, x.dtype) for size in sizes)
    n_experts = len(down.codes) // dim
    by_slot = n_tokens * top_k < n_experts
    shared = {"TOP_K": top_k, "CHOICES": triton.next_power_of_2(top_k), "BY_SLOT": by_slot}
    programs = min(n_tokens * top_k, n_experts)
    arguments, constants = _several_tokens(up, up_config, x)
    kernels.several_tokens_up_kernel[(triton.cdiv(rows_of_a * hidden, up_config["ROWS"]), programs)](
        x, *arguments, indices, a, slope, n_tokens, hidden, dim, up.codes.shape[1] // 16, up.scales.shape[1],
        SWIGLU=swiglu, **shared, **constants, **pdl,
    )  # fmt: skip
    partial = torch.empty(n_tokens * top_k, dim, dtype=torch.float32, device=x.device)
    arguments, constants = _several_tokens(down, down_config, x)
    kernels.several_tokens_down_kernel[(triton.cdiv(dim, down_config["ROWS"]), programs)](
        a, *arguments, indices, weights, partial, n_tokens, dim, hidden, down.codes.shape[1] // 16,
        down.scales.shape[1], **shared, **constants, **pdl,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(dim))
    kernels.sum_kernel[(n_tokens, triton.cdiv(dim, block))](
        partial, out, dim, TOP_K=top_k, BLOCK=block, num_warps=4, **pdl
    )
    return out


def _one_token(weight: QuantizedWeight, config: dict) -> tuple[tuple, dict]:
    """Codes in words and scales, and the constants of a kernel."""
    units = weight.codes.shape[1] // 16
    constants = {"KIND": KINDS[weight.format], "GROUP": weight.group, "ROW_UNITS": units, **config}
    return _codes(weight, torch.int32), constants | {"EVEN": units % config["UNITS"] == 0}


def _several_tokens(weight: QuantizedWeight, config: dict, x: torch.Tensor) -> tuple[tuple, dict]:
    """Codes in halves of words and scales, and the constants of a kernel."""
    row_bytes = weight.codes.shape[1]
    is_even = row_bytes % (2 * config["HALVES"]) == 0 and weight.width * (4 if weight.group else 8) == row_bytes * 8
    constants = {"KIND": KINDS[weight.format], "GROUP": weight.group, "EVEN": is_even, **config}
    return _codes(weight, torch.int16), constants | {"ASM": x.is_cuda and x.dtype == torch.bfloat16}


def _codes(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.codes.contiguous().view(dtype), weight.scales.contiguous()


@torch.library.custom_op("fusedlm::quantized_experts", mutates_args=())
def _quantized_experts(
    x: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    up_format: str,
    up_group: int,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    down_width: int,
    down_format: str,
    down_group: int,
    indices: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    slope: float,
) -> torch.Tensor:
    up = QuantizedWeight(up_codes, up_scales, x.shape[1], up_format, up_group)
    down = QuantizedWeight(down_codes, down_scales, down_width, down_format, down_group)
    return run(x, up, down, indices, weights, activation, slope)


@_quantized_experts.register_fake
def _(x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def quantized_experts(x, up: QuantizedWeight, down: QuantizedWeight, indices, weights, activation: str, slope: float):
    (n_tokens, top_k), hidden = indices.shape, down.width
    is_few = 0 < n_tokens <= TOKENS and top_k <= CHOICES and n_tokens * top_k <= SLOTS and hidden > 0
    if is_few and not (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)):
        stacks = (up.codes, up.scales, up.format, up.group)
        stacks += (down.codes, down.scales, hidden, down.format, down.group)
        return _quantized_experts(x, *stacks, indices, weights, activation, slope)
    n_experts = len(down.codes) // x.shape[1]
    w_up, w_down = (decoded(stack, n_experts, x.dtype) for stack in (up, down))
    return routed_experts(x, w_up, w_down, indices, weights, activation, slope)
