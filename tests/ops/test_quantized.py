"""Weights in few bits: rounding by its definition, the product in float64, kernels."""

import math

import pytest
import torch

from fusedlm.ops import dequantize_mx, dequantize_weight, quantize_mx, quantize_weight, quantized_linear
from fusedlm.ops.quantized import reference
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.quantized.triton")
products = pytest.importorskip("fusedlm.ops.quantized.products")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [("mxfp4", None), ("int4", 32), ("int4", 64), ("int4", 128), ("fp8", None), ("int8", None)]
ALL = pytest.mark.parametrize(("format", "group"), FORMATS)


def _weight(n, width, seed=0):
    """Rows of very different size, one of zeros."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, width, generator=g) * torch.exp2(torch.arange(n) % 9 - 6.0)[:, None]
    weight[n // 2] = 0
    return weight


@ALL
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (6, 200), (7, 256)])
def test_rounding_by_its_definition(format, group, shape):
    weight = _weight(*shape)
    found = quantize_weight(weight, format, group)
    value = dequantize_weight(found, torch.float64)
    if format == "mxfp4":
        assert torch.equal(value, dequantize_mx(quantize_mx(weight, "mxfp4"), torch.float64))
        return
    largest = {"int4": 7, "fp8": 448, "int8": 127}[format]
    for row in range(shape[0]):
        for start in range(0, shape[1], group or shape[1]):
            part = weight[row, start : start + (group or shape[1])].double()
            scale = (part.abs().max().float() / largest).to(torch.bfloat16 if group else torch.float32).double()
            if scale == 0:
                assert not value[row, start : start + len(part)].any()
                continue
            levels = torch.arange(-largest, largest + 1.0).double()
            if format == "fp8":
                levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
                levels = levels[levels.isfinite()]
            nearest = (part[:, None] / scale - levels).abs().amin(1)
            error = (value[row, start : start + len(part)] - part).abs() / scale
            assert (error <= nearest + 1e-4).all()  # division by the scale is in float32


@ALL
def test_layout_is_that_of_the_tensors(format, group):
    for shape in ((3, 5), (2, 64), (4, 129)):
        found = quantize_weight(_weight(*shape), format, group)
        codes, scales = reference.layout(*shape, format, reference.group_of(format, group))
        assert (tuple(found.codes.shape), found.codes.dtype) == codes
        assert (tuple(found.scales.shape), found.scales.dtype) == scales


@ALL
def test_the_product_is_that_of_the_values_in_float64(format, group):
    weight = quantize_weight(_weight(9, 150), format, group)
    x = torch.randn(2, 3, 150, dtype=torch.float64, requires_grad=True)
    y = quantized_linear(x, weight)
    assert_close(y, x @ dequantize_weight(weight, torch.float64).T, 1e-14)
    y.sum().backward()
    assert_close(x.grad, dequantize_weight(weight, torch.float64).sum(0).expand(2, 3, -1), 1e-14)
    part = weight.rows(2, 4)
    assert_close(quantized_linear(x, part), y[..., 2:6], 1e-14)
    assert part.nbytes == 4 * weight.nbytes // 9


def _check(format, group, n_tokens, width, n_out, dtype, floor, config=None):
    weight = quantize_weight(_weight(n_out, width).to(DEVICE), format, group)
    x = torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    arguments = (weight.codes, weight.scales, width, format, weight.group)
    found = kernels.run(x, *arguments, config=config)
    exact = reference.quantized_linear(x.double(), *arguments)
    same = reference.quantized_linear(x, *arguments)
    assert found.dtype == dtype and found.shape == (n_tokens, n_out)
    assert_close(found.double(), exact, max(2 * error_ratio(same.double(), exact), floor))


@ALL
@pytest.mark.parametrize(("width", "n_out"), [(1, 1), (31, 5), (200, 9), (1088, 6)])
def test_one_token(format, group, width, n_out, poisoned):
    _check(format, group, 1, width, n_out, torch.float32, 1e-6)


@ALL
@pytest.mark.parametrize("width", [256, 330, 700])
@pytest.mark.parametrize("config", [{"ROWS": 2, "UNITS": 2}, {"ROWS": 4, "UNITS": 8}])
def test_one_token_in_several_tiles(format, group, width, config, poisoned):
    """Tiles that divide the columns, and a last tile in part; 5 rows fill no tile of rows."""
    _check(format, group, 1, width, 5, torch.float32, 1e-6, config)


@ALL
@pytest.mark.parametrize(("width", "n_out"), [(1, 1), (200, 9), (1088, 6)])
def test_one_token_in_bfloat16(format, group, width, n_out, poisoned):
    """int4 subtracts its offset once per group there."""
    _check(format, group, 1, width, n_out, torch.bfloat16, 1e-6, {"ROWS": 4, "UNITS": 8})


@ALL
@pytest.mark.parametrize("exponent", [-60, -20, 40, 60])
def test_small_and_large_tokens(format, group, exponent, poisoned):
    """Exponents of codes are corrected in the tokens and in sums of products."""
    weight = quantize_weight(_weight(5, 200).to(DEVICE), format, group)
    x = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = (weight.codes, weight.scales, 200, format, weight.group)
    expected = reference.quantized_linear(x.double(), *arguments) * 2.0**exponent
    assert_close(kernels.run(x * 2.0**exponent, *arguments).double(), expected, 1e-6)


@ALL
@pytest.mark.parametrize(("n_tokens", "width", "n_out"), [(2, 31, 5), (32, 200, 70), (3, 1088, 64)])
def test_several_tokens(format, group, n_tokens, width, n_out, poisoned):
    _check(format, group, n_tokens, width, n_out, torch.float32, 1e-6)


SEVERAL = {"ROWS": 64, "HALVES": 16, "TOKENS": 32}


@pytest.mark.parametrize(("format", "group"), [("mxfp4", None), ("int4", 128), ("int8", None)])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_of_the_columns_add_up(format, group, splits, poisoned):
    _check(format, group, 4, 330, 5, torch.float32, 1e-6, SEVERAL | {"SPLITS": splits})


def test_splits_are_summed_in_a_fixed_order():
    weight = quantize_weight(_weight(5, 900).to(DEVICE), "int4", 32)
    x = torch.randn(3, 900, device=DEVICE)
    arguments = (x, weight.codes, weight.scales, 900, "int4", 32)
    first = kernels.run(*arguments, config=SEVERAL | {"SPLITS": 5})
    assert all(torch.equal(kernels.run(*arguments, config=SEVERAL | {"SPLITS": 5}), first) for _ in range(3))


def _bfloat16(words):
    """The two numbers in int64 words of 32 bits, float32 (..., 2)."""
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)
    return (halves << 16).to(torch.uint32).view(torch.float32)


def _ptx(program, words, scale):
    """What the few instructions of `_asm` compute, on int64 words of 32 bits."""
    values = {"$1": words, "$2": scale}
    for line in program.replace("{", "").replace("}", "").split(";"):
        operation, _, operands = line.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        to, *names = operands.split(", ")
        found = [torch.tensor(int(n, 0)) if n[0].isdigit() else values[n] for n in names]
        if operation == "fma.rn.bf16x2":
            a, b, c = (_bfloat16(v).double() for v in found)
            bits = (a * b + c).to(torch.bfloat16).view(torch.int16).long() & 0xFFFF
            values[to] = bits[..., 0] | bits[..., 1] << 16
            continue
        if operation == "lop3.b32":
            assert names[3] == "0xEA"  # (a & b) | c
        compute = {
            "mov.b32": lambda a: a,
            "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
            "shr.b32": lambda a, b: a >> b,
            "and.b32": lambda a, b: a & b,
            "mul.lo.u32": lambda a, b: (a * b) & 0xFFFFFFFF,
            "lop3.b32": lambda a, b, c, _: (a & b) | c,
        }[operation]
        values[to] = compute(*found)
    return _bfloat16(values["$0"])


@pytest.mark.parametrize("format", ["mxfp4", "int4", "fp8", "int8"])
def test_two_codes_at_a_time_have_their_values(format):
    """The PTX of the kernel, run here: every 16 bits of codes, beside others."""
    low = torch.arange(65536)
    words = low | low.flip(0) << 16
    group = reference.group_of(format, None)
    codes = torch.stack([low, low.flip(0)], -1).to(torch.uint16).view(torch.uint8).view(65536, 2, 2)
    scales = torch.ones(65536 * 2, 1) if not group else torch.rand(65536 * 2, 1).bfloat16()
    if format == "mxfp4":
        scales = (torch.arange(65536 * 2)[:, None] % 255).to(torch.uint8)
    rows = torch.nn.functional.pad(codes.reshape(-1, 2), (0, group // 2 - 2)) if group else codes.reshape(-1, 2)
    n = 4 if group else 2
    weight = reference.QuantizedWeight(rows, scales, n, format, group)
    expected = dequantize_weight(weight, torch.float32).bfloat16().float().view(65536, 2, n)
    value = reference.scale_values(scales, format).bfloat16().view(torch.int16).long().view(65536, 2) & 0xFFFF
    for place in range(n):
        found = _ptx(products._asm(format, place), words, value[:, 0] | value[:, 1] << 16)
        same = (found == expected[..., place]) | expected[..., place].isnan()
        assert same.all()


@pytest.mark.gpu
@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 16, 32])
@pytest.mark.parametrize(("width", "n_out"), [(1280, 5120), (4096, 14336), (33, 7), (1025, 2050)])
def test_kernels_on_a_gpu(format, group, n_tokens, width, n_out, dtype):
    # Adding random terms one after the other in float32 errs by about 2^-24 sqrt(terms / 2) of the sum.
    _check(format, group, n_tokens, width, n_out, dtype, max(1e-6, 2**-24 * width**0.5))


def test_small_weights_use_few_splits():
    device = torch.device("cpu")  # three multiprocessors
    for sizes, splits in (((8, 64, 4096), 6), ((8, 64, 1000), 1), ((8, 640, 4096), 1)):
        assert kernels.config_of(*sizes, "fp8", torch.float32, device)["SPLITS"] == splits
    for row_bytes, splits in ((8192, 3), (4096, 2), (2752, 1)):  # of 32 rows
        assert kernels.config_of(8, 64, row_bytes, "fp8", torch.bfloat16, device)["SPLITS"] == splits


def test_tiles_follow_the_number_of_tokens_and_the_length_of_rows():
    def config(n_tokens, row_bytes, format="mxfp4", dtype=torch.bfloat16):
        return kernels.config_of(n_tokens, 64, row_bytes, format, dtype, torch.device("cpu"))

    assert [config(1, row_bytes)["UNITS"] for row_bytes in (16, 512, 1024, 1376)] == [1, 32, 64, 128]
    assert [config(1, 2048, format)["UNITS"] for format in ("mxfp4", "int4", "fp8")] == [64, 32, 128]
    assert config(1, 2048, dtype=torch.float32)["UNITS"] == 32
    assert [config(n, 2048)["TOKENS"] for n in (2, 16, 17, 32)] == [16, 16, 32, 32]
    assert [config(n, 2048)["ROWS"] for n in (16, 17)] == [32, 64]
    assert [config(16, 1376, format)["HALVES"] for format in ("mxfp4", "int4", "fp8")] == [64, 128, 128]
    options = torch.bfloat16, torch.device("cpu")
    assert [kernels.config_of(16, n_out, 512, "mxfp4", *options)["HALVES"] for n_out in (1280, 3072)] == [64, 128]
    rows = [kernels.config_of(32, 14336, 2048, format, *options)["ROWS"] for format in ("mxfp4", "int4", "fp8", "int8")]
    assert rows == [128, 128, 64, 64]


def test_more_tokens_and_gradients_run_the_reference():
    weight = quantize_weight(torch.randn(5, 40, device=DEVICE), "mxfp4")
    arguments = (weight.codes, weight.scales, 40, "mxfp4", 32)
    x = torch.randn(33, 40, device=DEVICE)
    assert torch.equal(kernels.quantized_linear(x, *arguments), reference.quantized_linear(x, *arguments))
    x = torch.randn(1, 40, device=DEVICE, requires_grad=True)
    kernels.quantized_linear(x, *arguments).sum().backward()
    assert_close(x.grad[0], dequantize_weight(weight).sum(0), 1e-6)
    assert kernels.quantized_linear(torch.empty(0, 40, device=DEVICE), *arguments).shape == (0, 5)


def test_every_code_has_its_value():
    """Extremes, zeros of both signs and subnormals: one row per code, one column per scale."""
    for format, codes in (("fp8", 256), ("int8", 256), ("int4", 16), ("mxfp4", 16)):
        group = reference.group_of(format, None)
        code = torch.arange(codes, device=DEVICE)
        code = code[(code & 0x7F) != 0x7F] if format == "fp8" else code
        packed = code[:, None].repeat(1, group // 2 if group else 16)
        packed = (packed * 17 if group else packed).to(torch.uint8)
        for scale in (0, 1, 127, 250) if format == "mxfp4" else (1e-30, 0.3, 1e4):
            dtype = reference.layout(1, 1, format, group)[1][1]
            scales = torch.full((len(code), 1), scale, device=DEVICE, dtype=dtype)
            width = group or 16
            arguments = (packed, scales, width, format, group)
            for column in range(8):  # every place in a word
                x = torch.zeros(1, width, device=DEVICE)
                x[0, width - 8 + column] = 1
                exact = reference.quantized_linear(x.double(), *arguments)
                for tokens in (1, 2) if column == 7 else (1,):
                    config = {"ROWS": 64, "UNITS": 4} if tokens == 1 else None
                    found = kernels.run(x.expand(tokens, -1), *arguments, config=config)
                    assert_close(found.double(), exact.expand(tokens, -1), 1e-7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize_weight(torch.ones(2, 2), "int3"), "format='int3' must be one of mxfp4, int4, fp8, int8"),
        (lambda: quantize_weight(torch.ones(2, 2), "int4", 16), "group=16 must be one of 32, 64, 128"),
        (lambda: quantize_weight(torch.ones(2, 2), "fp8", 32), "group=32: only int4 has groups to choose, fp8"),
        (lambda: quantize_weight(torch.ones(2), "fp8"), r"weight \(2,\) torch.float32 must be a matrix of floats"),
        (lambda: quantize_weight(torch.tensor([[math.nan]]), "fp8"), "weight has NaN or infinity"),
        (
            lambda: quantized_linear(torch.ones(3), quantize_weight(torch.ones(2, 2), "fp8")),
            r"x \(3,\) must be \(..., 2\)",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_operator_passes_opcheck():
    weight = quantize_weight(torch.randn(5, 40, device=DEVICE), "int4")
    arguments = (torch.randn(2, 40, device=DEVICE), weight.codes, weight.scales, 40, "int4", weight.group)
    torch.library.opcheck(torch.ops.fusedlm.quantized_linear.default, arguments)
