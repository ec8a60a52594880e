"""Products of 1 to 32 tokens with weights in few bits in Triton, bound by reading the codes once.

Codes are decoded in registers. One token is multiplied on the CUDA cores in float32, in units of 16 bytes of codes;
more tokens on the tensor cores, 64 or more rows of the weight by 32 tokens. Where a weight has too few rows for the
device, its columns are split, and a second kernel adds the parts in a fixed order.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.common.device import n_multiprocessors, pdl_options
from fusedlm.ops.common.sums import column_sums
from fusedlm.ops.mx.triton import scale_value
from fusedlm.ops.quantized import reference

TOKENS = 32  # of the kernel for several tokens, which fills them up
_KINDS = {"mxfp4": 0, "int4": 1, "fp8": 2, "int8": 3}
_MXFP4, _INT4, _FP8, _INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _decode(code, KIND: tl.constexpr):
    """The values of int32 codes without their scale, float32: of few integer operations per element, which bound the
    kernels. Exponent and mantissa move to their place in a float32, whose bias is then corrected; integers become the
    lowest bits of 2^23."""
    if KIND == _MXFP4:
        bits = ((code & 8) << 28) | ((code & 7) << 22)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    elif KIND == _INT4:
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif KIND == _FP8:
        bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    else:
        value = ((code ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return value


@triton.jit
def _load_scale(at, inside, KIND: tl.constexpr):
    """Scales of groups, float32."""
    scale = tl.load(at, mask=inside, other=0)
    return scale_value(scale.to(tl.int32)) if KIND == _MXFP4 else scale.to(tl.float32)


@triton.jit
def _shifted(word, BITS: tl.constexpr):
    """word << BITS, or >> -BITS."""
    return word << BITS if BITS >= 0 else word >> -BITS


@triton.jit
def _decode_word(word, INDEX: tl.constexpr, KIND: tl.constexpr):
    """As `_decode`, of one of the 8 or 4 codes of a word of 32 bits, without taking it apart into bytes."""
    if KIND == _MXFP4:
        bits = (_shifted(word, 28 - 4 * INDEX) & -0x80000000) | (_shifted(word, 22 - 4 * INDEX) & 0x01C00000)
        value = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif KIND == _INT4:
        value = (((word >> (4 * INDEX)) & 0xF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif KIND == _FP8:
        bits = (_shifted(word, 24 - 8 * INDEX) & -0x80000000) | (_shifted(word, 20 - 8 * INDEX) & 0x07F00000)
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        value = (((word >> (8 * INDEX)) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return value


@triton.jit(do_not_specialize=["units_per_split"])
def one_token_kernel(
    x, codes, scales, out, n_out, width, row_words, n_groups, units_per_split,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """codes: words of 32 bits. out: (splits, N). Grid: (blocks of rows, splits)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_out
    rows = codes + row.to(tl.int64)[:, None, None] * row_words
    PER_WORD: tl.constexpr = 8 if GROUP > 0 else 4
    offset = tl.arange(0, UNITS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    first = tl.program_id(1) * units_per_split
    last = tl.minimum((first + units_per_split) * 4, row_words)
    at = first * 4 + offset
    word = tl.load(rows + at[None, :, :], mask=row_inside[:, None, None] & (at < last)[None, :, :], other=0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(first, tl.cdiv(last, 4), UNITS):
        current = word ^ -0x7F7F7F80 if KIND == _INT8 else word  # the sign bits of four bytes
        at = start * 4 + offset
        is_part = at < last
        column = at * PER_WORD
        # The next codes are on their way while these are multiplied.
        following = at + UNITS * 4
        inside = row_inside[:, None, None] & (following < last)[None, :, :]
        word = tl.load(rows + following[None, :, :], mask=inside, other=0)
        product = tl.zeros((ROWS, UNITS, 4), tl.float32)
        for i in tl.static_range(PER_WORD):
            value = tl.load(x + column + i, mask=is_part & (column + i < width), other=0.0).to(tl.float32)
            product += _decode_word(current, i, KIND) * value[None, :, :]
        if GROUP > 0:
            group = (start + tl.arange(0, UNITS)) // (GROUP // 32)
            group_at = scales + row.to(tl.int64)[:, None] * n_groups + group[None, :]
            scale = _load_scale(group_at, row_inside[:, None] & (group < n_groups)[None, :], KIND)
            total += tl.sum(product, 2) * scale
        else:
            total += tl.sum(product, 2)
    y = tl.sum(total, 1)
    if GROUP == 0:
        y *= tl.load(scales + row, mask=row_inside, other=0.0)
    tl.store(out + tl.program_id(1).to(tl.int64) * n_out + row, y.to(out.dtype.element_ty), mask=row_inside)


@triton.jit(do_not_specialize=["n_tokens"])
def several_tokens_kernel(
    x, codes, scales, out, n_tokens, n_out, width, row_bytes, n_groups, bytes_per_split,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr,
    GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out: (splits, tokens, N). Grid: (blocks of rows, splits). The weight is the left operand: narrow products with 64
    rows of tokens would leave most of them empty."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_out
    token = tl.arange(0, TOKENS)
    PER_BYTE: tl.constexpr = 2 if GROUP > 0 else 1
    COLUMNS: tl.constexpr = PER_BYTE * BYTES
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    first = tl.program_id(1) * bytes_per_split
    last = tl.minimum(first + bytes_per_split, row_bytes)
    for start in range(first, last, BYTES):
        byte = start + tl.arange(0, BYTES)
        at = codes + row.to(tl.int64)[:, None] * row_bytes + byte[None, :]
        code = tl.load(at, mask=row_inside[:, None] & (byte < last)[None, :], other=0).to(tl.int32)
        if GROUP > 0:
            value = tl.join(_decode(code & 0xF, KIND), _decode(code >> 4, KIND))
            group = start * 2 // GROUP + tl.arange(0, GROUPS)
            at = scales + row.to(tl.int64)[:, None] * n_groups + group[None, :]
            scale = _load_scale(at, row_inside[:, None] & (group < n_groups)[None, :], KIND)
            value = tl.reshape(value, (ROWS, GROUPS, COLUMNS // GROUPS)) * scale[:, :, None]
            value = tl.reshape(value, (ROWS, COLUMNS))
        else:
            value = _decode(code, KIND)
        column = start * PER_BYTE + tl.arange(0, COLUMNS)
        inside = (column < width) & (column < last * PER_BYTE)
        at = x + token[:, None] * width + column[None, :]
        tokens = tl.load(at, mask=(token < n_tokens)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(value.to(x.dtype.element_ty), tl.trans(tokens), total, input_precision="ieee")
    if GROUP == 0:
        total *= tl.load(scales + row, mask=row_inside, other=0.0)[:, None]
    part = tl.program_id(1).to(tl.int64) * n_tokens + token
    at = out + part[None, :] * n_out + row[:, None]
    tl.store(at, total.to(out.dtype.element_ty), mask=row_inside[:, None] & (token < n_tokens)[None, :])


def config_of(n_tokens: int, n_out: int, row_bytes: int, device: torch.device) -> dict:
    """Tile, splits of the columns, and launch options. A split makes about two waves of programs, of 2 KiB of codes per
    row or more."""
    if n_tokens == 1:
        units = min(64, triton.next_power_of_2(max(1, triton.cdiv(row_bytes, 16))))
        config = {"ROWS": 4, "UNITS": units, "num_warps": 4}
        least, tile = 2048, 16 * units
    else:
        config = {"ROWS": 64, "BYTES": 64, "num_warps": 4, "num_stages": 4}
        least, tile = 512, 64
    blocks = triton.cdiv(n_out, config["ROWS"])
    splits = min(2 * n_multiprocessors(device) // max(blocks, 1), row_bytes // max(least, tile))
    return config | {"SPLITS": max(1, splits)}


def run(x, codes, scales, width: int, format: str, group: int, config: dict | None = None) -> torch.Tensor:
    """Launch the kernels on x (..., K) of 1 to 32 tokens. config: instead of that of `config_of`."""
    n_out, row_bytes = codes.shape
    n_tokens = x.numel() // width
    config = dict(config or config_of(n_tokens, n_out, row_bytes, x.device))
    splits = config.pop("SPLITS")
    out = torch.empty(*x.shape[:-1], n_out, dtype=x.dtype, device=x.device)
    partial = out if splits == 1 else torch.empty(splits, n_tokens * n_out, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n_out, config["ROWS"]), splits)
    constants = {"KIND": _KINDS[format], "GROUP": group, **config, **pdl_options(x.device)}
    tensors = x.contiguous(), codes.contiguous(), scales.contiguous(), partial
    if n_tokens == 1:
        units = triton.cdiv(triton.cdiv(row_bytes, 16), splits * config["UNITS"]) * config["UNITS"]
        x, codes, *rest = tensors
        words = codes.view(torch.int32)
        one_token_kernel[grid](x, words, *rest, n_out, width, row_bytes // 4, scales.shape[1], units, **constants)
    else:
        per_split = triton.cdiv(row_bytes, splits * config["BYTES"]) * config["BYTES"]
        groups = max(1, 2 * config["BYTES"] // group) if group else 1  # of the columns that are read at a time
        several_tokens_kernel[grid](
            *tensors, n_tokens, n_out, width, row_bytes, scales.shape[1], per_split,
            **constants, TOKENS=TOKENS, GROUPS=groups,
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
