"""Time forward and backward of a linear layer in bf16 and with 8-bit products, casts included, and the casts alone.

    python benchmarks/quantised_linear.py [--shapes 16384x4096x14336 ...] [--only NAME ...] [--tiles] [--out FILE]

Every contender takes a bfloat16 input and a float32 weight, which it casts itself. Ours cast the weight in every call,
as in a step of one micro-batch, and with `, weight cast before` not at all, as in the later micro-batches of a step.
Outputs and gradients are checked against float64 first: ours must be as exact as the emulation. The floor of the 8-bit
contenders is the time of the three products alone, measured on codes in the same run, plus that of the bytes of the
casts at the rate of a copy. --tiles times the casts with other tiles too. --quick uses a tiny shape, to try the script
where there is no GPU.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import measure_ceilings, median_ms, poison  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device  # noqa: E402
from fusedlm.ops import LowPrecision, isolate_outliers, low_precision_linear, low_precision_weight  # noqa: E402
from fusedlm.ops.low_precision import reference  # noqa: E402
from fusedlm.ops.low_precision.cost import cast_bytes, weight_bytes  # noqa: E402
from fusedlm.ops.low_precision.linear import FAST_SUMS  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402
from fusedlm.testing import error_ratio  # noqa: E402

SHAPES = ("16384x4096x14336", "16384x2048x8192", "16384x1024x4096")
PRECISIONS = {
    "fp8 row": LowPrecision(),
    "fp8 row, e5m2": LowPrecision(gradients="e5m2"),
    "fp8 tensor": LowPrecision(scales="tensor"),
    "int8 row": LowPrecision("int8"),
}
_TORCHAO = {"torchao tensor": LowPrecision(scales="tensor", gradients="e5m2"), "torchao row": LowPrecision()}
BEFORE = ", weight cast before"
ISOLATED = ", outliers isolated"
NAMES = ("bf16", "bf16 norm", *PRECISIONS, *(name + BEFORE for name in PRECISIONS), "fp8 row norm",
         "fp8 row" + ISOLATED, "torchao tensor", "torchao row")  # fmt: skip
EPS = 1e-6
OUTLIERS = 3.5  # the z-score beyond which columns leave the 8-bit products
_SAMPLED = 256  # rows that are compared
_TILES = [(32, 256, 8), (32, 128, 4), (64, 128, 8), (64, 256, 8), (128, 64, 8), (128, 128, 8), (128, 128, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens x inputs x outputs")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--fast-sums", action="store_true", help="sum gradients in fewer bits too")
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.fast_sums:
        FAST_SUMS.update(dict.fromkeys(FAST_SUMS, True))
    device = resolve_device(arguments.device)
    shapes = ["64x32x48"] if arguments.quick else arguments.shapes
    command = shlex.join(["python", "benchmarks/quantised_linear.py", *sys.argv[1:]])
    record = {"name": "quantised_linear", "command": command, "environment": environment(device, torch.bfloat16)}
    ceilings = measure_ceilings(device, torch.bfloat16, arguments.quick)
    record |= {"ceilings": vars(ceilings), "cases": []}
    print(f"copy {ceilings.bytes_per_second / 1e9:,.0f} GB/s, bf16 {ceilings.flops_per_second / 1e12:,.0f} TFLOP/s")
    for shape in shapes:
        case = measure(shape, arguments.only, device, ceilings.bytes_per_second, arguments.quick, arguments.tiles)
        record["cases"].append(case)
        print("\n".join(lines(case)), flush=True)
        if arguments.out:  # after every shape, so that a run that is stopped leaves a record
            write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def measure(shape: str, names, device: torch.device, bandwidth: float, quick: bool, tiles: bool) -> dict:
    """The record of one shape.

    Args:
        bandwidth: of a copy, bytes per second.
        tiles: whether to time casts with other tiles.

    Raises:
        ValueError: the shape is not three sizes.
    """
    try:
        n, k, m = map(int, shape.split("x"))
    except ValueError:
        raise ValueError(f"shape {shape!r} must be tokens x inputs x outputs, such as {SHAPES[0]}") from None
    torch.manual_seed(0)
    x = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(m, k, device=device) / k**0.5
    dy = torch.randn(n, m, device=device, dtype=torch.bfloat16)
    gain = 1 + 0.3 * torch.rand(k, device=device)
    floors = {
        name: _floor_ms(x, weight, dy, precision, bandwidth, quick)
        for name, precision in PRECISIONS.items()
        if name in names or name + BEFORE in names
    }
    torch._dynamo.reset()  # which counts variants of a function over all shapes
    contenders = _contenders(weight, quick)
    times, found = {}, []
    for name in [name for name in NAMES if name in names]:
        one = _one(name, contenders.get(name), x, weight, gain, dy, quick)
        times[name] = one["milliseconds"]
        floor = floors.get(name.removesuffix(BEFORE))
        if floor is not None and name.endswith(BEFORE):
            floor -= 1e3 * weight_bytes(k, m, PRECISIONS[name.removesuffix(BEFORE)]) / bandwidth
        bf16 = times.get("bf16 norm" if "norm" in name else "bf16")
        speedup = bf16 / times[name] if bf16 and times[name] else None
        found.append(one | {"floor_ms": floor, "speedup": speedup})
    case = {"shape": shape, "contenders": found}
    return case | {"casts": casts(x, weight, gain, dy, bandwidth, quick, tiles)}


@dataclass
class Contender:
    """function: (x, weight, gain) -> output, compiled. before: called with the weight before it, uncompiled, as in
    training. weight: its own, instead of ours."""

    function: Callable
    before: Callable | None = None
    weight: torch.Tensor | None = None


def _contenders(weight, quick: bool) -> dict[str, Contender]:
    def bf16(x, weight, gain):
        return F.linear(x, weight.to(x.dtype))

    def bf16_norm(x, weight, gain):
        return F.linear(F.rms_norm(x.float(), gain.shape, gain, EPS).to(x.dtype), weight.to(x.dtype))

    contenders = {"bf16": Contender(bf16), "bf16 norm": Contender(bf16_norm)}
    for name, precision in PRECISIONS.items():
        codes = low_precision_weight(weight, precision)

        def ours(x, weight, gain, precision=precision, codes=codes):
            return low_precision_linear(x, weight, precision, codes=codes)

        def ours_norm(x, weight, gain, precision=precision, codes=codes):
            return low_precision_linear(x, weight, precision, codes=codes, gain_K=gain, eps=EPS)

        cast = partial(low_precision_weight, precision=precision, out=codes)
        contenders |= {name: Contender(ours, cast), name + BEFORE: Contender(ours)}
        if name == "fp8 row":

            def isolated(x, weight, gain, precision=precision, codes=codes):
                x, extra, _, _ = isolate_outliers(x, weight, OUTLIERS)
                return low_precision_linear(x, weight, precision, codes=codes) + extra

            contenders["fp8 row norm"] = Contender(ours_norm, cast)
            contenders[name + ISOLATED] = Contender(isolated, cast)
    contenders |= _torchao(weight)
    for contender in contenders.values():
        # Of torchao's layer nothing is known about graph breaks.
        options = {"fullgraph": contender.weight is None, "backend": "aot_eager" if quick else "inductor"}
        contender.function = torch.compile(contender.function, **options)
    return contenders


def _torchao(weight) -> dict[str, Contender]:
    """Its float8 layer, tensor-wise and row-wise, with a bfloat16 weight, where it can be imported."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        return {}
    contenders = {}
    for name, recipe in (("torchao tensor", "tensorwise"), ("torchao row", "rowwise")):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        layer.weight = torch.nn.Parameter(weight.detach().bfloat16())
        config = Float8LinearConfig.from_recipe_name(recipe)
        model = convert_to_float8_training(torch.nn.Sequential(layer), config=config)
        contenders[name] = Contender(lambda x, weight, gain, model=model: model(x), weight=model[0].weight)
    return contenders


def _one(name: str, contender: Contender | None, x, weight, gain, dy, quick: bool) -> dict:
    """Errors of output and both gradients against float64, and then milliseconds."""
    result = {"name": name, "errors": None, "milliseconds": None, "reason": None}
    if contender is None:
        return result | {"reason": "torchao cannot be imported"}
    x, weight, gain = (t.detach().requires_grad_() for t in (x, weight, gain))
    own = weight if contender.weight is None else contender.weight
    inputs = [x, own, gain] if "norm" in name else [x, own]

    def run():
        if contender.before is not None:
            contender.before(weight)
        y = contender.function(x, weight, gain)
        # Detached: an output that lives keeps its graph, whose leaves remember a stream that is not captured.
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    poison(x.device)
    try:
        y, dx, dw, *_ = run()
    except (RuntimeError, ValueError) as error:
        return result | {"reason": str(error).partition("\n")[0][:200]}
    exact = _exact(x, weight, gain, dy, "norm" in name)
    result["errors"] = [error_ratio(*pair) for pair in zip((y, dx, dw), exact, strict=True)]
    bounds = _bounds(name, x, weight, dy)
    if not all(error <= bound for error, bound in zip(result["errors"], bounds, strict=True)):
        return result | {"reason": f"wrong: errors beyond {', '.join(f'{bound:.1e}' for bound in bounds)}"}
    try:
        replay = _captured(run, x.device)
    except RuntimeError as error:
        return result | {"reason": f"cannot be captured: {str(error).partition(chr(10))[0][:200]}"}
    return result | {"milliseconds": median_ms(replay, x.device, quick)}


def _exact(x, weight, gain, dy, has_norm: bool) -> list[torch.Tensor]:
    """Output and gradients of x and the weight, computed in float64."""
    x, weight = x.detach().double(), weight.detach().double()
    value = F.rms_norm(x.requires_grad_(), gain.shape, gain.detach().double(), EPS) if has_norm else x
    d_value = _chunked(dy.double(), weight)
    dx = torch.autograd.grad(value, x, d_value.double())[0] if has_norm else d_value
    value = value.detach()
    return [_chunked(value, weight.t()), dx, _chunked(dy.double().t(), value)]


def _chunked(a, b) -> torch.Tensor:
    """a b in float64, 4096 rows at a time, in float32."""
    return torch.cat([(part @ b).float() for part in a.split(4096)])


def _bounds(name: str, x, weight, dy) -> list[float]:
    """Of the errors: 1.3 times those of the emulation on some of the tokens; of bf16 1%."""
    if name.startswith("bf16"):
        return [0.01] * 3
    precision = (PRECISIONS | _TORCHAO)[name.removesuffix(BEFORE).removesuffix(ISOLATED).removesuffix(" norm")]
    rows = slice(0, max(_SAMPLED, len(x) // 16))
    x, dy, weight = x.detach()[rows], dy[rows], weight.detach()
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = low_precision_linear(*leaves, precision, backend="reference")
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    exact = x.double() @ weight.double().t(), dy.double() @ weight.double(), dy.double().t() @ x.double()
    return [1.3 * error_ratio(*pair) for pair in zip(found, exact, strict=True)]


def _captured(run: Callable, device: torch.device) -> Callable:
    """A function that replays one call as a CUDA graph; on the CPU the call."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # for which libraries have their workspaces now
        run()
    return graph.replay


def _engine(device: torch.device):
    if device.type != "cuda":
        return reference
    from fusedlm.ops.low_precision import triton

    return triton


def _floor_ms(x, weight, dy, precision: LowPrecision, bandwidth: float, quick: bool) -> float:
    """The three products on codes that exist, and the bytes of the casts, the weight's included."""
    engine, grid, gradient = _engine(x.device), precision.grid, precision.gradient_grid
    by_row = precision.by_row
    a = engine.cast(x, None, "none", 0.0, None, grid, by_row)[0]
    b = engine.cast_weight(weight, grid, by_row)
    amax = reference.row_amax(dy)
    if by_row:
        fold = a.scales
        amax_t = (dy.abs().float() * fold[:, None]).amax(0) if grid.is_integer else (amax * fold).amax(0, keepdim=True)
    else:
        amax, fold, amax_t = amax.amax(0, keepdim=True), None, None
    g = engine.cast_gradient(dy, amax, fold, amax_t, gradient)

    def products():
        engine.multiply(a.codes, a.scales, grid, b.codes, b.scales, grid, x.dtype, FAST_SUMS["output"])
        engine.multiply(g.codes, g.scales, gradient, b.codes_t, b.scales_t, grid, x.dtype, FAST_SUMS["input"])
        engine.multiply(
            g.codes_t, g.scales_t, gradient, a.codes_t, a.scales_t, grid, torch.float32, FAST_SUMS["weight"]
        )

    n, (m, k) = len(x), weight.shape
    moved = cast_bytes(n, k, m, precision) - (8 * (n * m + n * k + k * m) if grid.is_integer else 0)
    moved += weight_bytes(k, m, precision)
    return median_ms(_captured(products, x.device), x.device, quick) + 1e3 * moved / bandwidth


def casts(x, weight, gain, dy, bandwidth: float, quick: bool, tiles: bool) -> list[dict]:
    """The casts alone, with the bytes that each must move and the fraction of the copy bandwidth that it reaches."""
    engine, grid = _engine(x.device), LowPrecision().grid
    amax_x, amax = reference.row_amax(x), reference.row_amax(dy)
    fold = torch.rand_like(amax)
    amax_t = (amax * fold).amax(0, keepdim=True)
    out = engine.cast_weight(weight, grid, True)
    of_x = 4 * x.numel()
    of_cast = {
        "x, its largest magnitudes too": ("computed", of_x, (x, None, "none", 0.0, None)),
        "x": ("given", of_x, (x, None, "none", 0.0, amax_x)),
        "the norm of x": ("computed", of_x, (x, gain, "norm", EPS, None)),
    }
    functions = {
        f"cast of {name}": (kind, n_bytes, partial(engine.cast, *arguments, grid, True))
        for name, (kind, n_bytes, arguments) in of_cast.items()
    } | {
        "cast of the gradient": ("given", 4 * dy.numel(), partial(engine.cast_gradient, dy, amax, fold, amax_t, grid)),
        "cast of the weight": ("given", 14 * weight.numel(), partial(engine.cast_weight, weight, grid, True, out)),
        "largest magnitudes of x": (None, 2 * x.numel(), partial(reference.row_amax, x)),
    }
    found = []
    for (name, (kind, n_bytes, function)), tile in itertools.product(functions.items(), [None, *_TILES * tiles]):
        if tile is not None and (kind is None or engine is reference):
            continue
        configs = getattr(engine, "CONFIGS", {})
        before = dict(configs)
        if tile is not None:
            configs[kind] = dict(zip(("ROWS", "COLUMNS", "num_warps"), tile, strict=True))
        try:
            milliseconds = median_ms(_captured(function, x.device), x.device, quick)
        finally:
            configs.update(before)
        fraction = 1e3 * n_bytes / bandwidth / milliseconds
        found.append({"name": name, "tile": tile, "milliseconds": milliseconds, "of_copy": fraction})
    return found


def lines(case: dict) -> list[str]:
    """What is printed of a shape."""
    shown = [case["shape"]]
    for one in case["contenders"]:
        errors = "" if one["errors"] is None else "errors " + " ".join(f"{error:.1e}" for error in one["errors"])
        if one["milliseconds"] is None:
            shown.append(f"  {one['name']:36} {one['reason']}  {errors}")
            continue
        floor = "" if one["floor_ms"] is None else f"{one['floor_ms'] / one['milliseconds']:6.1%} of the floor"
        speedup = "" if one["speedup"] is None else f"{one['speedup']:5.2f}x bf16"
        shown.append(f"  {one['name']:36} {one['milliseconds']:9.4f} ms  {speedup:11} {floor:20} {errors}")
    for one in case["casts"]:
        tile = "" if one["tile"] is None else f", tile {one['tile']}"
        shown.append(
            f"  {one['name']:36} {one['milliseconds']:9.4f} ms  {one['of_copy']:6.1%} of the rate of a copy{tile}"
        )
    return shown


if __name__ == "__main__":
    main()
