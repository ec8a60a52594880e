"""Products of 1 to 32 tokens with weights in few bits in Triton, bound by reading the codes once.

Codes are decoded in registers. One token is multiplied on the CUDA cores in float32, in units of 16 bytes of codes,
by programs of few rows and one warp; more tokens on the tensor cores, 64 or more rows of the weight by 32 tokens. Where
a weight has too few rows for these, its columns are split, and a second kernel adds the parts in a fixed order.
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
def _halves(word, INDEX: tl.constexpr, KIND: tl.constexpr):
    """Two codes of a word of 32 bits, INDEX and INDEX + 4 (of four bits) or + 2 (of eight), as the bits of two
    bfloat16 numbers, the first in the low half; of numbers with an exponent, 2^-126 (mxfp4) or 2^-120 (fp8) times the
    value."""
    if KIND == _MXFP4:
        pair = _shifted(word, 12 - 4 * INDEX) & -0x7FFF8000
        pair |= _shifted(word, 6 - 4 * INDEX) & 0x01C001C0
    else:
        pair = _shifted(word, 8 - 8 * INDEX) & -0x7FFF8000
        pair |= _shifted(word, 4 - 8 * INDEX) & 0x07F007F0
    return pair


@triton.jit
def _two_values(word, INDEX: tl.constexpr, KIND: tl.constexpr):
    """Two codes of a word of 32 bits, as `_halves` numbers them, float32. mxfp4 and fp8: with the factor of `_halves`;
    int4: plus 24."""
    if KIND == _INT4:  # 16 + code: the code is the highest bits of a mantissa
        low = (_shifted(word, 19 - 4 * INDEX) & 0x780000) | 0x41800000
        high = (_shifted(word, 3 - 4 * INDEX) & 0x780000) | 0x41800000
    elif KIND == _INT8:  # 2^23 + code
        low = ((word >> (8 * INDEX)) & 0xFF) | 0x4B000000
        high = ((word >> (8 * INDEX + 16)) & 0xFF) | 0x4B000000
    else:
        pair = _halves(word, INDEX, KIND)
        low = pair << 16
        high = pair & -0x10000
    low = low.to(tl.float32, bitcast=True)
    high = high.to(tl.float32, bitcast=True)
    if KIND == _INT8:
        low -= 8388736.0
        high -= 8388736.0
    return low, high


@triton.jit
def _load_words(rows, word, row_words, MASKED: tl.constexpr):
    """(ROWS, WORDS). Past the end of a row any code will do: it meets zeros of x."""
    if MASKED:
        return tl.load(rows + word[None, :], mask=(word < row_words)[None, :], other=0)
    return tl.load(rows + word[None, :])


@triton.jit
def _multiply(word, x, column, width, PER_WORD: tl.constexpr, KIND: tl.constexpr, FOLD: tl.constexpr):
    """Products of words (ROWS, WORDS) with their columns of x, summed over each word: of mxfp4 2^-62 and of fp8 2^-56
    times the products, exact while |x| is below 2^64. FOLD: of int4 the products with 24 more than the value, and the
    sums of these columns of x."""
    WORDS: tl.constexpr = word.shape[1]
    BITS: tl.constexpr = PER_WORD // 2
    value = tl.load(x + column, mask=column < width, other=0.0)
    product = tl.zeros(word.shape, tl.float32)
    sums = tl.zeros((WORDS,), tl.float32)
    if PER_WORD == 8:
        a, b = tl.split(tl.reshape(value, (WORDS, 2, 2, 2)))
        a0, a2 = tl.split(a)
        b0, b2 = tl.split(b)
        x0, x4 = tl.split(a0)
        x1, x5 = tl.split(b0)
        x2, x6 = tl.split(a2)
        x3, x7 = tl.split(b2)
        product, sums = _multiply_two(product, sums, word, x0, x4, 0, KIND, FOLD)
        product, sums = _multiply_two(product, sums, word, x1, x5, 1, KIND, FOLD)
        product, sums = _multiply_two(product, sums, word, x2, x6, 2, KIND, FOLD)
        product, sums = _multiply_two(product, sums, word, x3, x7, 3, KIND, FOLD)
    else:
        a, b = tl.split(tl.reshape(value, (WORDS, 2, 2)))
        x0, x2 = tl.split(a)
        x1, x3 = tl.split(b)
        product, sums = _multiply_two(product, sums, word, x0, x2, 0, KIND, FOLD)
        product, sums = _multiply_two(product, sums, word, x1, x3, 1, KIND, FOLD)
    return product, sums


@triton.jit
def _multiply_two(product, sums, word, x_low, x_high, INDEX: tl.constexpr, KIND: tl.constexpr, FOLD: tl.constexpr):
    low, high = _two_values(word, INDEX, KIND)
    x_low = x_low.to(tl.float32)
    x_high = x_high.to(tl.float32)
    if (KIND == _MXFP4) | (KIND == _FP8):
        x_low *= 18446744073709551616.0  # 2^64
        x_high *= 18446744073709551616.0
    if KIND == _INT4:
        if FOLD:
            sums += x_low + x_high
        else:
            low -= 24.0
            high -= 24.0
    product += low * x_low[None, :]
    product += high * x_high[None, :]
    return product, sums


@triton.jit
def one_token_kernel(
    x, codes, scales, out, n_out, width, row_units, n_groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """codes: words of 32 bits, 4 to a unit. EVEN: UNITS divides the units of a row. Grid: blocks of rows."""
    WORDS: tl.constexpr = 4 * UNITS
    PER_WORD: tl.constexpr = 8 if GROUP > 0 else 4
    # One subtraction per group instead of one per element costs 3 bits of float32, which bfloat16 does not see.
    FOLD: tl.constexpr = (KIND == _INT4) & (x.dtype.element_ty != tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_out
    row = tl.minimum(row, n_out - 1).to(tl.int64)
    row_words = row_units * 4
    rows = codes + row[:, None] * row_words
    word = tl.arange(0, WORDS)
    unit = tl.arange(0, UNITS)
    column = tl.arange(0, WORDS * PER_WORD)
    code = _load_words(rows, word, row_words, not EVEN)
    if GROUP > 0:
        groups = scales + row[:, None] * n_groups
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, row_units, UNITS):
        current = code ^ -0x7F7F7F80 if KIND == _INT8 else code  # the sign bits of four bytes
        # The next codes are on their way while these are multiplied.
        following = start + UNITS
        if following < row_units:
            code = _load_words(rows, following * 4 + word, row_words, not EVEN)
        product, sums = _multiply(current, x, start * 4 * PER_WORD + column, width, PER_WORD, KIND, FOLD)
        product = tl.sum(tl.reshape(product, (ROWS, UNITS, 4)), 2)
        if FOLD:
            product -= 24 * tl.sum(tl.reshape(sums, (UNITS, 4)), 1)[None, :]
        if KIND == _MXFP4:
            product *= 4611686018427387904.0  # 2^62
        if GROUP > 0:
            group = (start + unit) // (GROUP // 32)
            product *= _load_scale(groups + group[None, :], (group < n_groups)[None, :], KIND)
        total += product
    y = tl.sum(total, 1)
    if KIND == _FP8:
        y *= 72057594037927936.0  # 2^56
    if GROUP == 0:
        y *= tl.load(scales + row)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row_inside)


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
    """Tile and launch options; of several tokens also the splits of the columns, which make about two waves of
    programs, of 512 bytes of codes per row or more."""
    if n_tokens == 1:
        units = min(32, triton.next_power_of_2(max(1, triton.cdiv(row_bytes, 16))))
        return {"ROWS": 4, "UNITS": units, "num_warps": 1}
    config = {"ROWS": 64, "BYTES": 64, "num_warps": 4, "num_stages": 4}
    blocks = triton.cdiv(n_out, config["ROWS"])
    splits = min(2 * n_multiprocessors(device) // max(blocks, 1), row_bytes // 512)
    return config | {"SPLITS": max(1, splits)}


def run(x, codes, scales, width: int, format: str, group: int, config: dict | None = None) -> torch.Tensor:
    """Launch the kernels on x (..., K) of 1 to 32 tokens. config: instead of that of `config_of`."""
    n_out, row_bytes = codes.shape
    n_tokens = x.numel() // width
    config = dict(config or config_of(n_tokens, n_out, row_bytes, x.device))
    splits = config.pop("SPLITS", 1)
    out = torch.empty(*x.shape[:-1], n_out, dtype=x.dtype, device=x.device)
    constants = {"KIND": _KINDS[format], "GROUP": group, **config, **pdl_options(x.device)}
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    blocks = triton.cdiv(n_out, config["ROWS"])
    if n_tokens == 1:
        units = row_bytes // 16
        one_token_kernel[(blocks,)](
            x, codes.view(torch.int32), scales, out, n_out, width, units, scales.shape[1],
            EVEN=units % config["UNITS"] == 0, **constants,
        )  # fmt: skip
        return out
    partial = out if splits == 1 else torch.empty(splits, n_tokens * n_out, dtype=torch.float32, device=x.device)
    per_split = triton.cdiv(row_bytes, splits * config["BYTES"]) * config["BYTES"]
    groups = max(1, 2 * config["BYTES"] // group) if group else 1  # of the columns that are read at a time
    several_tokens_kernel[(blocks, splits)](
        x, codes, scales, partial, n_tokens, n_out, width, row_bytes, scales.shape[1], per_split,
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
