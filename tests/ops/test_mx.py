"""The MX formats: values of the standard, every exponent, damaged blocks, kernels, and torchao as a second opinion."""

import math

import pytest
import torch

from fusedlm.ops import dequantize_mx, quantize_mx
from fusedlm.ops.mx import reference
from fusedlm.ops.mx.formats import FORMATS, MXTensor

kernels = pytest.importorskip("fusedlm.ops.mx.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = pytest.mark.parametrize("name", FORMATS)
SCALINGS = pytest.mark.parametrize("scaling", ["floor", "rceil"])


def _bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32).view(torch.float32)


def blocks(dtype=torch.float32) -> torch.Tensor:
    """(n, 32): largest magnitudes of every exponent of float32, one step below, at and above the mantissas where a
    scale changes; elements of all magnitudes below them; ties of every element; zeros; subnormals."""
    g = torch.Generator().manual_seed(0)
    mantissas = {0, 1, 0x7FFFFF} | {f.largest_mantissa + d for f in FORMATS.values() for d in (-1, 0, 1)}
    tops = [(e << 23) | m for e in range(255) for m in sorted(mantissas) if (e << 23) | m > 0]
    tops += [1 << n for n in range(23)]
    top = _bits(*tops)[:, None]
    near = torch.rand(len(tops), 31, generator=g).double() * 2 - 1
    far = near * torch.exp2(-torch.randint(0, 40, near.shape, generator=g).double())
    random = torch.cat([torch.cat([top, (top.double() * part).float()], 1) for part in (near, far)])
    ties = []
    for format in FORMATS.values():
        values = reference.element_values(format, torch.device("cpu")).double()
        values = values[values.isfinite()].unique()
        middle = torch.cat([values, (values[1:] + values[:-1]) / 2])
        middle = torch.cat([middle, middle.new_zeros(-len(middle) % 31)]).view(-1, 31)
        middle = torch.cat([torch.full((len(middle), 1), format.largest_value), middle], 1)
        ties += [(middle * 2.0**e).float() for e in (-140, -127, -126, -60, 0, 100)]
    zeros = torch.zeros(2, 32).copysign(torch.tensor([[1.0], [-1.0]]))
    x = torch.cat([random, *ties, zeros])
    return x[x.isfinite().all(1)].to(dtype)


def definition(x: torch.Tensor, format, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, scales) by float64 arithmetic: the nearest of all elements, the one with an even code in a tie."""
    x = x.double()
    largest = x.abs().amax(1)
    fraction, exponent = torch.frexp(largest)  # largest = fraction * 2^exponent, fraction in [0.5, 1)
    power = exponent - 1 - format.emax
    if scaling == "rceil":
        power = power + (2 * fraction > format.largest_value / 2**format.emax).int()
    power = torch.where(largest == 0, -127, power).clamp(-127, 127)
    code = torch.arange(1 << format.bits)
    values = reference.element_values(format, torch.device("cpu")).double()
    kept = values.isfinite() & (values.abs() <= format.largest_value)  # -2 of INT8 is not used
    code, values = code[kept], values[kept]
    values, order = values.sort(stable=True)
    code = code[order]
    scaled = torch.ldexp(x, -power[:, None])
    above = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    tie_to_low = code[above - 1] % 2 == 0
    take_low = (scaled - low < high - scaled) | ((scaled - low == high - scaled) & tie_to_low)
    return torch.ldexp(torch.where(take_low, low, high), power[:, None]), power + 127


@ALL
@SCALINGS
def test_conversion_by_its_definition(name, scaling):
    x = blocks()
    values, scales = definition(x, FORMATS[name], scaling)
    found = quantize_mx(x, name, scaling, backend="reference")
    assert torch.equal(found.scales[:, 0].long(), scales.long())
    assert torch.equal(dequantize_mx(found, torch.float64, backend="reference"), values)
    if name != "mxint8":
        back = dequantize_mx(found, backend="reference")
        assert torch.equal(back.signbit(), x.signbit()), "negative zero too"


@pytest.mark.filterwarnings("ignore:overflow encountered")  # rceil rounds 2^128 - 2^104 up
@ALL
@SCALINGS
def test_kernels_give_the_bits_of_the_reference(name, scaling, poisoned):
    x = torch.cat([blocks()[::7], special_blocks()]).to(DEVICE)
    expected = quantize_mx(x, name, scaling, backend="reference")
    found = kernels.quantize(x, name, scaling)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    value = kernels.dequantize(found.codes, found.scales, 32, name, torch.float32)
    assert _same(value, dequantize_mx(expected, backend="reference"))


@ALL
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 0), (0, 40), (5, 31), (2, 3, 100), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_in_any_shape(name, shape, dtype, poisoned):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    expected = quantize_mx(x, name, backend="reference")
    found = kernels.quantize(x, name, "floor")
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    value = kernels.dequantize(found.codes, found.scales, shape[-1], name, torch.float32)
    assert value.shape == shape and torch.equal(value, dequantize_mx(expected, backend="reference"))


def test_the_kernel_reads_strided_input():
    x = torch.randn(70, 64, device=DEVICE).T[3:40]
    found = kernels.quantize(x, "mxfp6_e3m2", "floor")
    expected = quantize_mx(x, "mxfp6_e3m2", backend="reference")
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


def special_blocks() -> torch.Tensor:
    rows = torch.ones(6, 32)
    for row, value in zip(
        rows, (math.nan, math.inf, -math.inf, -math.nan, _bits(0x7F800001).item(), 2.5e38), strict=True
    ):
        row[11] = value
    return rows


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN for NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


@ALL
@SCALINGS
def test_nan_and_infinity_make_a_block_nan(name, scaling):
    found = quantize_mx(special_blocks(), name, scaling, backend="reference")
    assert found.scales[:5, 0].eq(255).all() and not found.codes[:5].any() and found.scales[5, 0] < 255
    value = dequantize_mx(found, backend="reference")
    assert value[:5].isnan().all() and value[5].isfinite().all()


@ALL
def test_every_code_and_scale_decodes_to_its_value(name):
    """Section 5.3 and 5.4.1: sign, exponent and mantissa; E8M0 from 2^-127, with NaN at 255."""
    format = FORMATS[name]
    code = torch.arange(256 // (1 << format.bits) * (1 << format.bits)) % (1 << format.bits)
    packed = reference.pack(code.to(torch.uint8), format)
    assert torch.equal(reference.unpack(packed, format).long(), code)
    tensors = [
        MXTensor(
            packed.view(1, -1).to(DEVICE), torch.full((1, 8), s, dtype=torch.uint8, device=DEVICE), (1, 256), format
        )
        for s in (0, 1, 126, 127, 128, 200, 255)
    ]
    for tensor in tensors:
        power = tensor.scales[0, 0].item() - 127
        expected = [math.nan if power == 128 else _value(c, format) * 2.0**power for c in code.tolist()]
        expected = torch.tensor(expected, dtype=torch.float64, device=DEVICE)[None]
        assert _same(dequantize_mx(tensor, torch.float64, backend="reference"), expected)
        value = kernels.dequantize(tensor.codes, tensor.scales, 256, name, torch.float32)
        assert _same(value, expected.float())


def _value(code: int, format) -> float:
    """Tables 2 to 6 of the standard and of OCP 8-bit floating point, by hand."""
    if format.is_integer:
        return (code - 256 if code > 127 else code) / 64
    sign = -1.0 if code >> (format.bits - 1) else 1.0
    magnitude = code & ((1 << (format.bits - 1)) - 1)
    exponent, mantissa = divmod(magnitude, 1 << format.mantissa)
    if format.name == "mxfp8_e4m3" and magnitude == 0x7F:
        return math.nan
    if format.name == "mxfp8_e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    bias = {"mxfp4": 1, "mxfp6_e2m3": 1, "mxfp6_e3m2": 3, "mxfp8_e4m3": 7, "mxfp8_e5m2": 15}[format.name]
    fraction = mantissa / (1 << format.mantissa)
    return sign * (math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias))


def test_ties_and_packing_by_hand():
    x = torch.zeros(32)
    x[:10] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0, 6.0, -100 / 16])
    found = quantize_mx(x, "mxfp4", backend="reference")
    # 0 1 1 2 2 4 4 -0 6 -6; the even element in the low nibble
    assert found.codes[:5].tolist() == [0x20, 0x42, 0x64, 0x86, 0xF7] and found.scales.tolist() == [127]
    x[:4] = torch.tensor([0.125, 0.25, 7.5, -1.0])
    codes = quantize_mx(x, "mxfp6_e2m3", backend="reference").codes[:3].tolist()
    word = 0b000001 | 0b000010 << 6 | 0b011111 << 12 | 0b101000 << 18
    assert codes == list(word.to_bytes(3, "little"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(dtype):
    found = quantize_mx(torch.randn(4, 64), "mxint8")
    assert torch.equal(dequantize_mx(found, dtype, backend="reference"), dequantize_mx(found).to(dtype))


# SQNR in dB of a million normal elements, as docs/quantization.md gives it.
SQNR = {
    "mxfp4": (18.8, 18.7),
    "mxfp6_e2m3": (30.9, 30.9),
    "mxfp6_e3m2": (25.4, 25.5),
    "mxfp8_e4m3": (30.6, 31.5),
    "mxfp8_e5m2": (25.4, 25.5),
    "mxint8": (41.7, 41.6),
}


@ALL
def test_signal_to_noise_is_as_documented(name):
    x = torch.randn(8192, 128, generator=torch.Generator().manual_seed(0))
    for scaling, expected in zip(("floor", "rceil"), SQNR[name], strict=True):
        error = (dequantize_mx(quantize_mx(x, name, scaling)) - x).double()
        assert round(10 * math.log10(x.double().square().sum() / error.square().sum()), 1) == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize_mx(torch.ones(32), "fp4"), "format='fp4' must be one of mxfp4, mxfp6_e2m3"),
        (lambda: quantize_mx(torch.ones(32), "mxfp4", "even"), "scaling='even' must be one of floor, rceil"),
        (lambda: quantize_mx(torch.ones(32).double(), "mxfp4"), r"x \(32,\) torch.float64 must be"),
        (lambda: quantize_mx(torch.ones(()), "mxfp4"), r"x \(\) torch.float32 must be \(..., K\)"),
        (
            lambda: dequantize_mx(MXTensor(torch.ones(16).byte(), torch.ones(2).byte(), (32,), FORMATS["mxfp4"])),
            r"codes \(16,\) and scales \(2,\) of mxfp4 must be \(16,\) and \(1,\)",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e3m2"])
def test_operators_pass_opcheck(name):
    x = torch.randn(3, 40, device=DEVICE)
    torch.library.opcheck(torch.ops.fusedlm.quantize_mx.default, (x, name, "rceil"))
    found = kernels.quantize(x, name, "rceil")
    torch.library.opcheck(torch.ops.fusedlm.dequantize_mx.default, (found.codes, found.scales, 40, name, torch.float32))
