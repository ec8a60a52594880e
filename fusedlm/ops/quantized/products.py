"""Codes of few bits decoded in registers, and their products with tokens: the parts of kernels."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusedlm.ops.mx.triton import scale_value

KINDS = {"mxfp4": 0, "int4": 1, "fp8": 2, "int8": 3}
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
def _scale_values(scale, KIND: tl.constexpr, BFLOAT16: tl.constexpr):
    """Of the scales of groups, float32 or bfloat16. Of mxfp4 in bfloat16 by few operations: the code of NaN is
    infinity."""
    if KIND == _MXFP4:
        if BFLOAT16:
            bits = tl.maximum(scale.to(tl.int32) << 7, 64)  # 2^-127 is no normal number
            value = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            value = scale_value(scale.to(tl.int32))
    else:
        value = scale if BFLOAT16 else scale.to(tl.float32)
    return value


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
def row_products(
    x, codes, scales, row, width, row_units, n_groups,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, EVEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The products of one token x with rows of a weight, (ROWS,) float32.

    codes: words of 32 bits, 4 to a unit. row: int64. EVEN: UNITS divides the units of a row. PDL: x is of a kernel that
    may not have ended, for which this waits after it has loaded the first codes."""
    WORDS: tl.constexpr = 4 * UNITS
    PER_WORD: tl.constexpr = 8 if GROUP > 0 else 4
    # One subtraction per group instead of one per element costs 3 bits of float32, which bfloat16 does not see.
    FOLD: tl.constexpr = (KIND == _INT4) & (x.dtype.element_ty != tl.float32)
    row_words = row_units * 4
    rows = codes + row[:, None] * row_words
    word = tl.arange(0, WORDS)
    unit = tl.arange(0, UNITS)
    column = tl.arange(0, WORDS * PER_WORD)
    code = _load_words(rows, word, row_words, not EVEN)
    if GROUP > 0:
        groups = scales + row[:, None] * n_groups
        group = unit // (GROUP // 32)
        scale = tl.load(groups + group[None, :], mask=(group < n_groups)[None, :], other=0)
    else:
        scale = tl.load(scales + row)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for start in range(0, row_units, UNITS):
        current = code ^ -0x7F7F7F80 if KIND == _INT8 else code  # the sign bits of four bytes
        current_scale = scale
        # The next codes are on their way while these are multiplied.
        following = start + UNITS
        if following < row_units:
            code = _load_words(rows, following * 4 + word, row_words, not EVEN)
            if GROUP > 0:
                group = (following + unit) // (GROUP // 32)
                scale = tl.load(groups + group[None, :], mask=(group < n_groups)[None, :], other=0)
        product, sums = _multiply(current, x, start * 4 * PER_WORD + column, width, PER_WORD, KIND, FOLD)
        product = tl.sum(tl.reshape(product, (ROWS, UNITS, 4)), 2)
        if FOLD:
            product -= 24 * tl.sum(tl.reshape(sums, (UNITS, 4)), 1)[None, :]
        if KIND == _MXFP4:
            product *= 4611686018427387904.0  # 2^62
        if GROUP > 0:
            product *= _scale_values(current_scale, KIND, False)
        total += product
    y = tl.sum(total, 1)
    if KIND == _FP8:
        y *= 72057594037927936.0  # 2^56
    if GROUP == 0:
        y *= scale
    return y


def _asm(kind: str, index: int) -> str:
    """PTX: code `index` of every 16 bits of $1, as two bfloat16 numbers in $0; with a scale $2 where codes have one."""

    def shifted(to: str, bits: int) -> str:
        return f"sh{'l' if bits > 0 else 'r'}.b32 {to}, $1, {abs(bits)};" if bits else f"mov.b32 {to}, $1;"

    product = "mov.b32 b, 0x80008000; fma.rn.bf16x2 $0, a, $2, b;"  # plus -0: rounded once
    if kind == "mxfp4":  # times 2^12 + 2^6: copies of the sign and of the magnitude in their places
        mask, factor = ("0x000F000F", "0x1040") if index % 2 == 0 else ("0x00F000F0", "0x0104")
        value = f"{shifted('a', -8 * (index // 2))} and.b32 a, a, {mask}; mul.lo.u32 a, a, {factor};"
        value += "and.b32 a, a, 0x81C081C0; mov.b32 b, 0x7E807E80; mov.b32 c, 0x80008000;"
        value += "fma.rn.bf16x2 a, a, b, c;" + product  # 2^126 corrects the bias
    elif kind == "int4":  # 128 + code: the lowest bits of a mantissa
        value = f"{shifted('a', -4 * index)} lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;"
        value += "mov.b32 b, 0x3F803F80; mov.b32 c, 0xC308C308; fma.rn.bf16x2 a, a, b, c;" + product
    elif kind == "fp8":  # exponent and mantissa move to their place; 2^120 corrects the bias
        value = f"{shifted('b', 8 - 8 * index)} and.b32 b, b, 0x80008000;"
        value += f"{shifted('a', 4 - 8 * index)} lop3.b32 a, a, 0x07F007F0, b, 0xEA;"
        value += "mov.b32 b, 0x7B807B80; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, a, b, c;"
    else:  # 128 + seven bits, less 128 or, by the sign, 256
        value = f"{shifted('a', -8 * index)} lop3.b32 b, a, 0x00800080, 0xC300C300, 0xEA;"
        value += "lop3.b32 a, a, 0x007F007F, 0x43004300, 0xEA;"
        value += "mov.b32 c, 0x3F803F80; fma.rn.bf16x2 $0, a, c, b;"
    return "{ .reg .b32 a, b, c; " + value + " }"


_ASM = tl.constexpr([[_asm(kind, i) for i in range(4 if kind in ("mxfp4", "int4") else 2)] for kind in KINDS])


@triton.jit
def _of_16_bits(code, scale, INDEX: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Code INDEX of every 16 bits (ROWS, HALVES), times its scale where codes have groups, in the dtype of scale. ASM:
    two at a time in bfloat16, which the compiler would take one by one; the same values, rounded once."""
    GROUPED: tl.constexpr = (KIND == _MXFP4) | (KIND == _INT4)
    if ASM:
        if GROUPED:
            value = tl.inline_asm_elementwise(_ASM[KIND][INDEX], "=r,r,r", [code, scale], tl.bfloat16, True, 2)
        else:
            value = tl.inline_asm_elementwise(_ASM[KIND][INDEX], "=r,r", [code], tl.bfloat16, True, 2)
    elif GROUPED:
        value = _decode((code.to(tl.int32) >> (4 * INDEX)) & 0xF, KIND) * scale.to(tl.float32)
    else:
        value = _decode((code.to(tl.int32) >> (8 * INDEX)) & 0xFF, KIND)
    return value.to(scale.dtype)


@triton.jit
def tile_products(
    x_rows, token_inside, codes, scales, row, width, row_units, n_groups, first, last,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr, TOKENS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The products of rows of a weight with several tokens, (ROWS, TOKENS) float32; of formats with a scale per row
    without it.

    x_rows: pointers (TOKENS, 1) to their first elements; token_inside: (TOKENS, 1), others count as zeros. codes: of 16
    bits, 8 to a unit, of which those from first to last are multiplied. EVEN: HALVES divides the codes of a row, and x
    has a column for each.

    The weight is the left operand: narrow products with 64 rows of tokens would leave most of them empty. The codes at
    one place of every 16 bits make a product with every fourth or second column of x: in another order of the columns,
    codes need not move between threads."""
    PER_HALF: tl.constexpr = 4 if GROUP > 0 else 2
    COLUMNS: tl.constexpr = PER_HALF * HALVES
    row_halves = row_units * 8
    rows = codes + row.to(tl.int64)[:, None] * row_halves
    half = tl.arange(0, HALVES)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(first, last, HALVES):
        at = start + half
        column = start * PER_HALF + tl.arange(0, COLUMNS)
        if EVEN:
            code = tl.load(rows + at[None, :])
            z = tl.load(x_rows + column[None, :], mask=token_inside, other=0.0)
        else:
            code = tl.load(rows + at[None, :], mask=(at < row_halves)[None, :], other=0)
            z = tl.load(x_rows + column[None, :], mask=token_inside & (column < width)[None, :], other=0.0)
        if GROUP > 0:
            GROUPS: tl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP else 1
            group = start * PER_HALF // GROUP + tl.arange(0, GROUPS)
            at = scales + row.to(tl.int64)[:, None] * n_groups + group[None, :]
            scale = tl.load(at, mask=(group < n_groups)[None, :], other=0)
            scale = _scale_values(scale, KIND, ASM).to(z.dtype)
            scale = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, HALVES // GROUPS))
            scale = tl.reshape(scale, (ROWS, HALVES))
            even, odd = tl.split(tl.reshape(z, (TOKENS, HALVES, 2, 2)))
            z0, z2 = tl.split(even)
            z1, z3 = tl.split(odd)
            total = tl.dot(_of_16_bits(code, scale, 0, KIND, ASM), tl.trans(z0), total, input_precision="ieee")
            total = tl.dot(_of_16_bits(code, scale, 1, KIND, ASM), tl.trans(z1), total, input_precision="ieee")
            total = tl.dot(_of_16_bits(code, scale, 2, KIND, ASM), tl.trans(z2), total, input_precision="ieee")
            total = tl.dot(_of_16_bits(code, scale, 3, KIND, ASM), tl.trans(z3), total, input_precision="ieee")
        else:
            z0, z1 = tl.split(tl.reshape(z, (TOKENS, HALVES, 2)))
            total = tl.dot(_of_16_bits(code, z, 0, KIND, ASM), tl.trans(z0), total, input_precision="ieee")
            total = tl.dot(_of_16_bits(code, z, 1, KIND, ASM), tl.trans(z1), total, input_precision="ieee")
    return total
