"""Products of 1 to 32 tokens with weights in few bits in Triton, bound by reading the codes once.

Codes are decoded in registers. One token is multiplied on the CUDA cores in float32, in units of 16 bytes of codes, of
four rows at a time, so that each x is read once for four of them. Several tokens are multiplied on the tensor cores,
for which two codes are decoded at a time. Where a weight has too few rows for these, its columns are split, and a
second kernel adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import n_multiprocessors, pdl_options
from fusedlm.ops.common.sums import column_sums
from fusedlm.ops.quantized import reference
from fusedlm.ops.quantized.products import KINDS, row_products, tile_products

TOKENS = 32  # at most


@triton.jit
def one_token_kernel(
    x, codes, scales, out, n_out, width, row_units, n_groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """codes: words of 32 bits, 4 to a unit. EVEN: UNITS divides the units of a row. Grid: blocks of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n_out
    row = tl.minimum(row, n_out - 1).to(tl.int64)
    y = row_products(x, codes, scales, row, width, row_units, n_groups, KIND, GROUP, ROWS, UNITS, EVEN, PDL)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tokens"])
def several_tokens_kernel(
    x, codes, scales, out, n_tokens, n_out, width, row_units, n_groups, tiles_per_split,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr, TOKENS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """codes: of 16 bits, 8 to a unit. out: (splits, tokens, N). Grid: (blocks of rows, splits). EVEN: HALVES divides
    the codes of a row, and x has a column for each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_out
    row = tl.minimum(row, n_out - 1)
    token = tl.arange(0, TOKENS)
    if GROUP == 0:
        row_scale = tl.load(scales + row)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(1) * tiles_per_split * HALVES
    last = tl.minimum(first + tiles_per_split * HALVES, row_units * 8)
    total = tile_products(
        x + token[:, None] * width, (token < n_tokens)[:, None], codes, scales, row, width, row_units, n_groups,
        first, last, KIND, GROUP, ROWS, HALVES, TOKENS, EVEN, ASM,
    )  # fmt: skip
    if GROUP == 0:
        total *= row_scale[:, None]
    part = tl.program_id(1).to(tl.int64) * n_tokens + token
    at = out + part[None, :] * n_out + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & (token < n_tokens)[None, :])


def config_of(n_tokens: int, n_out: int, row_bytes: int, format: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Tile and launch options, with UNITS of the kernel for one token; measured on an H100.

    One token: rows of up to 128 units are read at once, longer ones in pieces that keep enough of them on their way.
    Several: 128 or 256 bytes of 32 rows at a time, of 64 or 128 for more than 16 tokens, which every block of rows
    reads anew. Columns are split into about two waves of programs, of 2 KiB of codes per row or more, for the second
    kernel costs as much as reading these.
    """
    if n_tokens == 1:
        n_units = triton.cdiv(row_bytes, 16)
        units = triton.next_power_of_2(max(1, n_units))
        if n_units >= 128:
            units = {"mxfp4": 64, "int4": 32}.get(format, 128)
        if dtype != torch.bfloat16:
            units = min(units, 32)
        return {"ROWS": 4, "UNITS": units, "num_warps": max(1, units // 32)}
    if dtype == torch.bfloat16:
        if n_tokens <= 16:
            halves, stages = (64, 4) if format == "mxfp4" and row_bytes < 2048 and n_out < 2048 else (128, 3)
            rows, tokens, warps = 32, 16, 2
        elif format in ("mxfp4", "int4") and n_out >= 64 * n_multiprocessors(device):
            rows, halves, tokens, warps, stages = 128, 64, 32, 8, 4
        else:
            rows, halves, tokens, warps, stages = 64, 128, 32, 4, 3
        config = {"ROWS": rows, "HALVES": halves, "TOKENS": tokens, "num_warps": warps, "num_stages": stages}
        least = 2048
    else:
        config, least = {"ROWS": 64, "HALVES": 32, "TOKENS": 32, "num_warps": 4, "num_stages": 4}, 512
    blocks = triton.cdiv(n_out, config["ROWS"])
    splits = min(2 * n_multiprocessors(device) // max(blocks, 1), row_bytes // least)
    return config | {"SPLITS": max(1, splits)}


def run(x, codes, scales, width: int, format: str, group: int, config: dict | None = None) -> torch.Tensor:
    """Launch the kernels on x (..., K) of 1 to 32 tokens. config: instead of that of `config_of`."""
    n_out, row_bytes = codes.shape
    n_tokens = x.numel() // width
    config = dict(config or config_of(n_tokens, n_out, row_bytes, format, x.dtype, x.device))
    splits = config.pop("SPLITS", 1)
    out = torch.empty(*x.shape[:-1], n_out, dtype=x.dtype, device=x.device)
    constants = {"KIND": KINDS[format], "GROUP": group, **config, **pdl_options(x.device)}
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    blocks, units = triton.cdiv(n_out, config["ROWS"]), row_bytes // 16
    if "UNITS" in config:
        one_token_kernel[(blocks,)](
            x, codes.view(torch.int32), scales, out, n_out, width, units, scales.shape[1],
            EVEN=units % config["UNITS"] == 0, **constants,
        )  # fmt: skip
        return out
    partial = out if splits == 1 else torch.empty(splits, n_tokens * n_out, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(row_bytes, 2 * config["HALVES"])
    is_even = tiles * 2 * config["HALVES"] == row_bytes and width * (4 if group else 8) == row_bytes * 8
    several_tokens_kernel[(blocks, splits)](
        x, codes.view(torch.int16), scales, partial, n_tokens, n_out, width, units, scales.shape[1],
        triton.cdiv(tiles, splits), EVEN=is_even, ASM=x.is_cuda and x.dtype == torch.bfloat16, **constants,
    )  # fmt: skip
    return out if splits == 1 else column_sums(partial, x.dtype).view(out.shape)


@torch.library.custom_op("fusedlm::quantized_linear", mutates_args=())
def _quantized_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, width: int, format: str, group: int
) -> torch.Tensor:
    return run(x, codes, scales, width, format, group)


@_quantized_linear.register_fake
def _(x, codes, scales, width, format, group):
    return torch.empty(*x.shape[:-1], codes.shape[0], dtype=x.dtype, device=x.device)


def quantized_linear(x, codes, scales, width: int, format: str, group: int) -> torch.Tensor:
    is_few = 0 < x.numel() <= TOKENS * width and codes.numel() > 0
    differentiable = torch.is_grad_enabled() and x.requires_grad
    run_of = _quantized_linear if is_few and not differentiable else reference.quantized_linear
    return run_of(x, codes, scales, width, format, group)
