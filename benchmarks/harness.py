"""How an op is measured: checked against float64 first, then timed, with the floor that the device sets."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fusedlm.testing import error_ratio

Tensors = list[torch.Tensor]

OURS = "fusedlm"  # names of our own contenders begin with it
_MILLISECONDS = 600  # of timed calls, all contenders of a problem together
_MAX_CALLS = 300  # of each contender


@dataclass
class Problem:
    """One op at one shape and direction.

    Contenders take the leaves and return one output, or a tuple of its parts along the last dimension. What is compared
    is the output and, with an upstream gradient, the gradient of each leaf that requires one; `sample` selects from
    these what `exact` computes in float64. Contenders are timed as replays of a CUDA graph, which excludes the time of
    the host; those with the attribute `waits_for_device`, which cannot be captured, by plain calls.
    """

    op: str
    shape: str
    dtype: torch.dtype
    leaves: Tensors
    upstream: torch.Tensor | None  # None: forward only
    contenders: dict[str, Callable[..., torch.Tensor | tuple]]  # the first is eager PyTorch, whose error sets the bound
    exact: Callable[[], Tensors]
    sample: Callable[[Tensors], Tensors]
    n_bytes: int  # the fewest that must move through the device's memory
    n_flops: int = 0  # of matrix products
    min_bound: float | list[float] = 1e-5  # of the error, where eager PyTorch happens to be exact; a list: of each
    copies: int = 1  # of the leaves: the CUDA graph that is timed runs the problem on each
    part: tuple[str, Callable] | None = None  # name and function of a part of the work, timed too and not checked

    @property
    def direction(self) -> str:
        return "forward" if self.upstream is None else "forward + backward"


@dataclass
class Measured:
    """The result of one contender."""

    name: str
    errors: list[float]  # error ratios of what is compared
    milliseconds: float | None = None
    extra_mib: float | None = None  # peak memory beyond inputs, output and gradients
    reason: str | None = None  # why there is no time
    error_over_bound: float | None = None  # the largest; above 1 it is less exact than twice eager PyTorch


@dataclass
class Ceilings:
    """The measured rates of the device: bytes of a copy (read and written) and FLOPs of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, problem: Problem) -> float:
        return 1e3 * max(problem.n_bytes / self.bytes_per_second, problem.n_flops / self.flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    """By a device-to-device copy of 2 GiB and a matrix product of size 8192 (smaller on a CPU or when quick)."""
    n, size = (2**31, 8192) if device.type == "cuda" and not quick else (2**24, 512)
    flat = torch.randn(n // dtype.itemsize, device=device).to(dtype)
    copy = median_ms(partial(torch.empty_like(flat).copy_, flat), device, quick)
    square = torch.randn(size, size, device=device).to(dtype)
    product = median_ms(partial(torch.mm, square, square), device, quick)
    return Ceilings(2 * n / copy * 1e3, 2 * size**3 / product * 1e3)


def median_ms(function: Callable[[], object], device: torch.device, quick: bool) -> float:
    """The median of at least five calls after a warm-up: 100 ms of them, 20 when quick."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=10 if quick else 25, rep=20 if quick else 100, return_mode="median")
    function()
    seconds = []
    while len(seconds) < 5 or (sum(seconds) < 0.2 and not quick):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def measure(problem: Problem, device: torch.device, quick: bool) -> list[Measured]:
    """Every contender, checked against float64 and then timed.

    The bound of each error is twice that of eager PyTorch. One that exceeds it is timed all the same, with
    `error_over_bound` above 1, unless it is ours: then it is wrong. NaN, infinity or a wrong shape is never timed.
    """
    exact = problem.exact()
    bounds: list[float] | None = None
    measured = []
    timed: list[tuple[Measured, Callable]] = []
    for name, contender in problem.contenders.items():
        result = _checked(problem, name, contender, exact, device)
        measured.append(result)
        if result.reason is not None:
            continue
        if bounds is None:
            bounds = _bounds(problem, result.errors)
        result.error_over_bound = max(error / bound for error, bound in zip(result.errors, bounds, strict=True))
        if result.error_over_bound > 1 and name.startswith(OURS):
            result.reason = "wrong"
        else:
            timed.append((result, contender))
    if problem.part:
        name, part = problem.part
        measured.append(Measured(name, []))
        timed.append((measured[-1], part))
    functions = [_timed_function(problem, contender, device) for _, contender in timed]
    milliseconds = _interleaved([function for function, _ in functions], device, quick)
    for (result, _), (_, copies), found in zip(timed, functions, milliseconds, strict=True):
        result.milliseconds = found / copies
    return measured


def _bounds(problem: Problem, errors: list[float]) -> list[float]:
    """Of each error, from those of eager PyTorch."""
    least = problem.min_bound
    if isinstance(least, float):
        least = [least] * len(errors)
    return [max(2 * error, bound) for error, bound in zip(errors, least, strict=True)]


def _checked(problem: Problem, name: str, contender, exact: Tensors, device: torch.device) -> Measured:
    """Errors and memory of one call, or the reason why it cannot be timed."""
    run = _runner(problem, contender)
    gc.collect()  # garbage that is freed during the call would be missing in its memory
    poison(device)
    try:
        before = _in_use(device)
        found = run()
        extra = _peak(device) - before - sum(x.nbytes for x in found)
        result = Measured(name, [], extra_mib=extra / 2**20 if device.type == "cuda" else None)
        has_nan = any(bool(x.isnan().any()) for x in found)
        sampled = problem.sample(found)
    except torch.OutOfMemoryError:
        return Measured(name, [], reason="out of memory")
    shapes, expected = ([tuple(x.shape) for x in tensors] for tensors in (sampled, exact))
    if shapes != expected:
        result.reason = f"wrong shape: {shapes}, not {expected}"
        return result
    errors = [error_ratio(a, e) for a, e in zip(sampled, exact, strict=True)]
    if has_nan or not all(map(math.isfinite, errors)):
        result.reason = "NaN or infinity"
    else:
        result.errors = errors
    return result


def poison(device: torch.device) -> None:
    """Fill free memory, which is allocated next, with NaN."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.full((2**30,), float("nan"), device=device)


def _runner(problem: Problem, contender) -> Callable[[], Tensors]:
    inputs = [leaf for leaf in problem.leaves if leaf.requires_grad]

    def parts() -> Tensors:
        out = contender(*problem.leaves)
        return list(out) if isinstance(out, tuple) else [out]

    def forward() -> Tensors:
        with torch.no_grad():
            return parts()

    def both() -> Tensors:
        out = parts()
        upstream = problem.upstream
        if len(out) > 1:
            upstream = upstream.split([part.shape[-1] for part in out], dim=-1)
        # A part of the work may use some leaves alone.
        is_part = problem.part is not None and contender is problem.part[1]
        gradients = torch.autograd.grad(out, inputs, upstream, allow_unused=is_part)
        return [*(part.detach() for part in out), *gradients]

    return forward if problem.upstream is None else both


def _timed_function(problem: Problem, contender, device: torch.device) -> tuple[Callable[[], object], int]:
    """The function that is timed, and how many times it runs the problem."""
    if device.type != "cuda" or getattr(contender, "waits_for_device", False):
        return _runner(problem, contender), 1
    return _captured(problem, contender), problem.copies


def _interleaved(functions: list[Callable[[], object]], device: torch.device, quick: bool) -> list[float]:
    """Median ms of each. On a GPU the calls are interleaved in an order that changes: matrix products slow the device
    down by several percent for what follows, so that functions timed one after another could not be compared.
    """
    if device.type != "cuda":
        return [median_ms(function, device, quick) for function in functions]
    cache = torch.empty(2**28, dtype=torch.int8, device=device)  # five times that of an H100

    def once(function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()  # evicts what the last call left
        start.record()
        function()
        end.record()
        return start, end

    def elapsed(turns) -> list[list[float]]:
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in turn] for turn in turns]

    estimate = sum(statistics.median(turn) for turn in elapsed([[once(f) for _ in range(3)] for f in functions]))
    n_calls = min(_MAX_CALLS, max(9, int((50 if quick else _MILLISECONDS) / estimate)))
    turns: list[list] = [[] for _ in functions]
    shuffle = random.Random(0)
    for _ in range(n_calls):
        for i in shuffle.sample(range(len(functions)), len(functions)):
            turns[i].append(once(functions[i]))
    return [statistics.median(turn) for turn in elapsed(turns)]


def _captured(problem: Problem, contender) -> Callable[[], None]:
    """A function that replays the problem on copies of the leaves. Copies that together exceed the cache find nothing
    in it, and share the launch of the graph."""
    copies = [
        [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in problem.leaves]
        for _ in range(problem.copies)
    ]
    runs = [_runner(replace(problem, leaves=leaves), contender) for leaves in copies]

    def all_runs() -> None:
        for run in runs:
            run()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled and tuned before the capture
            all_runs()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_runs()

    def replay(_copies=copies) -> None:  # the graph reads their memory
        graph.replay()

    return replay


def _in_use(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@dataclass
class Op:
    """The cases of one op: shapes to report, small ones to try the script with, and their problems."""

    name: str
    shapes: list[tuple]
    quick_shapes: list[tuple]
    problems: Callable[..., list[Problem]] = field(repr=False)  # (shape, device, dtype) -> forward, and with backward
