"""Casts to 8 bits in Triton: one kernel reads a matrix once and writes it in both layouts that products contract over.

The matrix may be what a producer makes of its inputs (RMSNorm, SwiGLU, squared ReLU), which is then never in memory.
Magnitudes are compared as integers, in which NaN is the largest.
"""

import triton
import triton.language as tl


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr):
    """As `reference.scale_of`."""
    scale = tl.maximum(tl.div_rn(amax, LARGEST), 1.1754943508222875e-38)
    return tl.where(amax < float("inf"), scale, float("nan"))  # NaN is not less either


@triton.jit
def encode(value, LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, NATIVE: tl.constexpr):
    """As `reference.encode`. NATIVE: the device rounds to float8; if not, it is done in float32 and integers.

    Adding and subtracting 1.5 * 2^23 times the unit in the last place rounds to it, ties to even.
    """
    value = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
    is_nan = value != value
    if MANTISSA == 0:
        rounded = (value + 12582912.0) - 12582912.0
        code = tl.where(is_nan, 0.0, rounded).to(tl.int32).to(tl.int8).to(tl.uint8, bitcast=True)
    elif NATIVE:
        if MANTISSA == 3:
            code = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        bits = value.to(tl.int32, bitcast=True)
        power = tl.maximum(bits & 0x7F800000, (127 + EMIN) << 23).to(tl.float32, bitcast=True)
        shift = power * (1.5 * (1 << (23 - MANTISSA)))
        magnitude = tl.abs((value + shift) - shift)
        normal = (magnitude.to(tl.int32, bitcast=True) >> (23 - MANTISSA)) - ((126 + EMIN) << MANTISSA)
        subnormal = (tl.where(is_nan, 0.0, magnitude) * (1 << (MANTISSA - EMIN))).to(tl.int32)
        code = tl.where(magnitude * (1 << -EMIN) < 1.0, subnormal, normal)
        code = tl.where(is_nan, 0x7F, code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def produce(
    x, gain, inverse_rms, row, column, inside, x_row, n_columns, parameter, PRODUCER: tl.constexpr,
):  # fmt: skip
    """A tile of what the producer makes of x, in float32; inverse_rms (ROWS,) of a norm. As `reference.produce`."""
    at = row[:, None] * x_row + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if PRODUCER == "norm":
        g = tl.load(gain + column, mask=column < n_columns, other=0.0).to(tl.float32)
        value = value * g[None, :] * inverse_rms[:, None]
    elif PRODUCER == "swiglu":
        up = tl.load(x + at + n_columns, mask=inside, other=0.0).to(tl.float32)
        value = value * tl.sigmoid(value) * up
    elif PRODUCER == "relu2":
        value = tl.where(value < 0, value * parameter, value)
        value = value * value
    return value


@triton.jit
def row_statistics(
    x, gain, row, n_rows, x_row, n_columns, parameter,
    PRODUCER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of each row of what the producer makes, and the inverse root mean square of x."""
    one = tl.full((ROWS,), 1.0, tl.float32)
    largest = tl.zeros((ROWS,), tl.int32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        value = produce(x, gain, one, row, column, inside, x_row, n_columns, parameter, PRODUCER)
        largest = tl.maximum(largest, tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        if PRODUCER == "norm":
            z = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(z * z, 1)
    amax = largest.to(tl.float32, bitcast=True)
    inverse_rms = one
    if PRODUCER == "norm":
        inverse_rms = 1.0 / tl.sqrt(squares / n_columns + parameter)
        # Of all positive factors: the largest product is the product of the largest. NaN stays NaN.
        amax = amax * inverse_rms
    return amax, inverse_rms


@triton.jit
def statistics_kernel(
    x, gain, amax, inverse_rms, n_rows, x_row, n_columns, parameter,
    PRODUCER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    largest, inverse = row_statistics(x, gain, row, n_rows, x_row, n_columns, parameter, PRODUCER, ROWS, COLUMNS)
    tl.store(amax + row, largest, mask=row < n_rows)
    if PRODUCER == "norm":
        tl.store(inverse_rms + row, inverse, mask=row < n_rows)


@triton.jit
def cast_kernel(
    x, gain, inverse_rms, amax, fold, amax_t, codes, scales, codes_t, scales_t,
    n_rows, n_padded, x_row, n_columns, columns_per_program, parameter, one,
    PRODUCER: tl.constexpr, AMAX: tl.constexpr, TRANSPOSE: tl.constexpr,
    LARGEST: tl.constexpr, MANTISSA: tl.constexpr, EMIN: tl.constexpr, NATIVE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes (N, K) and their transpose (K, n_padded), zeros after row N.

    AMAX: computed: the program, which has all columns, finds that of its rows first; row: of each row; tensor: one.
    TRANSPOSE: same: the same bits; tensor, row: row n of x times fold[n], rounded with one scale, or one for each row
    of the transpose, from amax_t.
    one: 1.0, which the compiler does not know: it must round again for the transpose. Bytes that one conversion to
    float8 gives and two layouts store come out wrong from ptxas 12.9, which Triton uses (triton-lang/triton#11111).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < n_rows
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if AMAX == "computed":
        largest, inverse = row_statistics(x, gain, row, n_rows, x_row, n_columns, parameter, PRODUCER, ROWS, COLUMNS)
        if PRODUCER == "norm":
            tl.store(inverse_rms + row, inverse, mask=row_inside)
    else:
        if PRODUCER == "norm":
            inverse = tl.load(inverse_rms + row, mask=row_inside, other=0.0)
        if AMAX == "row":
            largest = tl.load(amax + row, mask=row_inside, other=0.0)
        else:
            largest = tl.load(amax + tl.zeros((ROWS,), tl.int32))
    scale = scale_of(largest, LARGEST)
    if tl.program_id(1) == 0:
        if AMAX == "tensor":
            tl.store(scales + row, scale, mask=row == 0)
        else:
            tl.store(scales + row, scale, mask=row_inside)
    to_codes = tl.div_rn(1.0, scale)
    if TRANSPOSE != "same":
        factor = tl.load(fold + row, mask=row_inside, other=0.0)
    first = tl.program_id(1) * columns_per_program
    for start in range(first, tl.minimum(first + columns_per_program, n_columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        column_inside = column < n_columns
        inside = row_inside[:, None] & column_inside[None, :]
        value = produce(x, gain, inverse, row, column, inside, x_row, n_columns, parameter, PRODUCER)
        scaled = value * to_codes[:, None]
        code = encode(scaled, LARGEST, MANTISSA, EMIN, NATIVE)
        tl.store(codes + row[:, None] * n_columns + column[None, :], code, mask=inside)
        if TRANSPOSE != "same":
            if TRANSPOSE == "row":
                largest_t = tl.load(amax_t + column, mask=column_inside, other=0.0)
            else:
                largest_t = tl.load(amax_t + tl.zeros((COLUMNS,), tl.int32))
            scale_t = scale_of(largest_t, LARGEST)
            if tl.program_id(0) == 0:
                is_stored = column_inside if TRANSPOSE == "row" else column == 0
                tl.store(scales_t + column, scale_t, mask=is_stored)
            scaled = value * factor[:, None] * tl.div_rn(1.0, scale_t)[None, :]
        else:
            scaled *= one
        # After the last row: zeros, though the scale may be NaN.
        code = encode(tl.where(row_inside[:, None], scaled, 0.0), LARGEST, MANTISSA, EMIN, NATIVE)
        at = column.to(tl.int64)[:, None] * n_padded + row[None, :]
        tl.store(codes_t + at, tl.trans(code), mask=column_inside[:, None] & (row < n_padded)[None, :])


@triton.jit
def rescale_kernel(
    total, a_scales, b_scales, out, n_rows, n_columns,
    A_BY_ROW: tl.constexpr, B_BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Integer sums (R, S) times the scales of their row and column."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_columns
    value = tl.load(total + row * n_columns + column, mask=inside, other=0).to(tl.float32)
    value *= tl.load(a_scales + (row if A_BY_ROW else 0))
    value *= tl.load(b_scales + (column if B_BY_ROW else tl.zeros_like(column)), mask=inside, other=0.0)
    tl.store(out + row * n_columns + column, value.to(out.dtype.element_ty), mask=inside)
