"""When 8-bit products pay: the time of a linear layer's step from the rates of a device and the bytes of the casts."""

import re
from dataclasses import dataclass
from math import log, sqrt

import torch

from fusedlm.ops.low_precision.formats import LowPrecision

_KERNEL_SECONDS = 3e-6  # of a kernel that has little to do
_CAST_EFFICIENCY = 0.5  # of the copy bandwidth, which casts in public code reach


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    bytes_per_second: of a copy, read and written.
    products: (sqrt(K M), rates) in increasing order, the rates of products of many tokens with a weight (M, K) in
        FLOP/s, by "bf16", "fp8 tensor", "fp8 row" and "int8"; what a device cannot run is missing.
    source: where the numbers are from.
    """

    bytes_per_second: float
    products: tuple[tuple[float, dict[str, float]], ...]
    source: str

    def product(self, kind: str, in_features: int, out_features: int) -> float | None:
        """The rate at a width, interpolated on a logarithmic scale; that of the nearest one outside of the table."""
        width = sqrt(in_features * out_features)
        known = [(at, rates[kind]) for at, rates in self.products if kind in rates]
        if not known:
            return None
        for (low, before), (high, after) in zip(known, known[1:], strict=False):
            if low <= width <= high:
                return before + (after - before) * log(width / low) / log(high / low)
        return known[0][1] if width < known[0][0] else known[-1][1]


def _tera(at: float, *rates: float) -> tuple[float, dict[str, float]]:
    kinds = ("bf16", "fp8 tensor", "fp8 row", "int8")
    return at, {kind: rate * 1e12 for kind, rate in zip(kinds, rates, strict=False)}


# 16384 tokens with weights 1024 to 4096, 2048 to 8192, 4096 to 14336 and 8192 to 8192; casts not included.
_H100 = Rates(
    3.02e12,
    (
        _tera(2048, 668, 1138, 1160, 599),
        _tera(4096, 666, 1185, 1326, 647),
        _tera(7663, 689, 1355, 1347, 859),
        _tera(8192, 681, 1392, 1328, 905),
    ),
    "measured on one H100",
)
_TABLE = (("H100 (PCIe|NVL)", None), ("H[128]00|GH200", _H100))


def rates_of(device: torch.device) -> Rates | None:
    """The rates of a device: from the table, or measured in a second; None for a CPU, which emulates."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((rates for words, rates in _TABLE if re.search(rf"\b({words})\b", name)), None)
    return found or measured_rates(device)


def measured_rates(device: torch.device, n_tokens: int = 8192, width: int = 4096) -> Rates:
    """Of a square product of that width, and of a copy of 256 MiB, the best of several calls."""
    x, w = (torch.randn(n, width, device=device, dtype=torch.bfloat16) for n in (n_tokens, width))
    one = torch.ones((), device=device)
    functions = {"bf16": lambda: x @ w.t()}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)

        def tensor_wise():
            torch._scaled_mm(x8, w8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

        scales = torch.ones(n_tokens, 1, device=device), torch.ones(1, width, device=device)

        def row_wise():
            torch._scaled_mm(x8, w8.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

        functions |= {"fp8 tensor": tensor_wise, "fp8 row": row_wise}
    xi, wi = x.to(torch.int8), w.to(torch.int8)
    functions["int8"] = lambda: torch._int_mm(xi, wi.t())
    flops = 2 * n_tokens * width * width
    found = {name: flops / _best_seconds(function) for name, function in functions.items()}
    source = torch.empty(2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))
    return Rates(bandwidth, ((float(width), found),), "measured at the start")


def _best_seconds(function, repeats: int = 10) -> float:
    for _ in range(3):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return 1e-3 * min(start.elapsed_time(end) for start, end in events)


def cast_bytes(n: int, k: int, m: int, precision: LowPrecision, *, compiled: bool = True) -> int:
    """Bytes that casts and rescaling move in one forward and backward pass of n tokens, beyond what a bf16 layer does;
    those of the weight excluded.

    compiled: the largest magnitudes of x and of the incoming gradient are found by the kernels that produce them.
    """
    per_element = 4 + (0 if compiled else 2)  # read in 16 bits, written twice in 8
    total = per_element * n * (k + m)
    if precision.grid.is_integer:
        total += 8 * (n * m + n * k + k * m)  # 32-bit sums written and read
        if precision.by_row:
            total += 2 * n * m  # largest magnitudes of the columns of the gradient
    return total


def weight_bytes(k: int, m: int, precision: LowPrecision) -> int:
    """Bytes of the cast of a float32 weight, once per optimizer step: a read for each largest magnitude, one for the
    cast, and two writes."""
    return (14 if precision.by_row else 10) * k * m


def speedup(
    rates: Rates,
    n: int,
    k: int,
    m: int,
    precision: LowPrecision,
    *,
    micro_batches: int = 1,
    compiled: bool = True,
) -> float | None:
    """The time of forward and backward of n tokens in bf16 over that in 8 bits, predicted; None where the device has
    no such products.

    Args:
        k, m: of the weight (M, K).
        micro_batches: in an optimizer step, in which the weight is cast once.
        compiled: whether torch.compile fuses the search for largest magnitudes.
    """
    flops, bandwidth = 2 * n * k * m, rates.bytes_per_second * _CAST_EFFICIENCY
    bf16 = rates.product("bf16", k, m)
    # A bf16 layer casts its weight in every micro-batch.
    before = 3 * flops / bf16 + 6 * k * m / bandwidth + 4 * _KERNEL_SECONDS
    if precision.format == "mxfp8":  # emulated: bf16 products, and values rounded and written again, twice per matrix
        return before / (before + 2 * 6 * (n * k + n * m + k * m) / bandwidth)
    kind = "int8" if precision.grid.is_integer else f"fp8 {precision.scales}"
    # The gradient of the weight has one scale.
    kinds = [kind, kind, kind if precision.grid.is_integer else "fp8 tensor"]
    if any(rates.product(kind, k, m) is None for kind in kinds):
        return None
    products = sum(flops / rates.product(kind, k, m) for kind in kinds)
    moved = cast_bytes(n, k, m, precision, compiled=compiled) + weight_bytes(k, m, precision) / micro_batches
    return before / (products + moved / bandwidth + 6 * _KERNEL_SECONDS)
