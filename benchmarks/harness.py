"""How an op is measured: correct first, then the median time, beside the floor that this device sets."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fusedlm.testing import error_ratio

Tensors = list[torch.Tensor]

_MILLISECONDS = 600  # that all contenders of a problem are timed for together
_MOST_CALLS = 300  # of each


@dataclass
class Problem:
    """One op at one shape and direction.

    Contenders take the leaves and give one output, or a tuple of its parts side by side. What is compared is the output
    and, with an upstream gradient, the gradient of each leaf that wants one; `sample` takes from these what `exact`
    computes in float64. Contenders are timed as replays of a CUDA graph, so that a slow host is not what is measured;
    one with the attribute `waits_for_device`, which a graph cannot hold, by its calls.
    """

    op: str
    shape: str
    dtype: torch.dtype
    leaves: Tensors
    upstream: torch.Tensor | None  # None: forward only
    contenders: dict[str, Callable[..., torch.Tensor | tuple]]  # the first is eager PyTorch, by which errors are judged
    exact: Callable[[], Tensors]
    sample: Callable[[Tensors], Tensors]
    n_bytes: int  # the fewest that must move through the device's memory
    n_flops: int = 0  # of matrix products
    floor: float = 1e-5  # of the allowed error, where eager PyTorch is right by luck
    copies: int = 1  # of the leaves: a CUDA graph is timed that goes through them all
    alone: tuple[str, Callable] | None = None  # a part of the work by its name, timed beside the whole and not checked

    @property
    def direction(self) -> str:
        return "forward" if self.upstream is None else "forward + backward"


@dataclass
class Measured:
    """Of one contender."""

    name: str
    errors: list[float]
    milliseconds: float | None = None  # None: wrong, and so not timed
    extra_mib: float | None = None  # most memory in use beyond inputs, output and gradients
    reason: str | None = None  # why there is no time


@dataclass
class Ceilings:
    """What the device does at best, measured now: bytes copied (read and written) and FLOPs of a large product."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, problem: Problem) -> float:
        return 1e3 * max(problem.n_bytes / self.bytes_per_second, problem.n_flops / self.flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> Ceilings:
    """A device-to-device copy of 2 GiB and a product of 8192 (small on a CPU or when quick)."""
    n, size = (2**31, 8192) if device.type == "cuda" and not quick else (2**24, 512)
    flat = torch.randn(n // dtype.itemsize, device=device).to(dtype)
    copy = median_ms(partial(torch.empty_like(flat).copy_, flat), device, quick)
    square = torch.randn(size, size, device=device).to(dtype)
    product = median_ms(partial(torch.mm, square, square), device, quick)
    return Ceilings(2 * n / copy * 1e3, 2 * size**3 / product * 1e3)


def median_ms(function: Callable[[], object], device: torch.device, quick: bool) -> float:
    """Of at least five calls after a warm-up: 100 ms of them, 20 when quick."""
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
    """Every contender: checked against float64, then timed if it is no worse than twice eager PyTorch."""
    exact = problem.exact()
    allowed: list[float] | None = None
    measured = []
    timed: list[tuple[Measured, Callable]] = []
    for name, contender in problem.contenders.items():
        run = _runner(problem, contender)
        gc.collect()  # what would be freed meanwhile would be missing in what the contender holds
        poison(device)
        try:
            before = _in_use(device)
            found = run()
            extra = _peak(device) - before - sum(x.nbytes for x in found)
            result = Measured(name, [error_ratio(a, e) for a, e in zip(problem.sample(found), exact, strict=True)])
            result.extra_mib = extra / 2**20 if device.type == "cuda" else None
            del found
        except torch.OutOfMemoryError:
            measured.append(Measured(name, [], reason="out of memory"))
            continue
        if allowed is None:
            allowed = [max(2 * error, problem.floor) for error in result.errors]
        if all(error <= bound for error, bound in zip(result.errors, allowed, strict=True)):
            timed.append((result, contender))
        else:
            result.reason = "wrong"
        measured.append(result)
    if problem.alone:
        name, part = problem.alone
        measured.append(Measured(name, []))
        timed.append((measured[-1], part))
    repeated = [_repeatable(problem, contender, device) for _, contender in timed]
    milliseconds = _side_by_side([function for function, _ in repeated], device, quick)
    for (result, _), (_, copies), found in zip(timed, repeated, milliseconds, strict=True):
        result.milliseconds = found / copies
    return measured


def poison(device: torch.device) -> None:
    """Fill memory that is free, and will be handed out next, with NaN."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.full((2**30,), float("nan"), device=device)


def _runner(problem: Problem, contender) -> Callable[[], Tensors]:
    wanted = [leaf for leaf in problem.leaves if leaf.requires_grad]

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
        return [*(part.detach() for part in out), *torch.autograd.grad(out, wanted, upstream)]

    return forward if problem.upstream is None else both


def _repeatable(problem: Problem, contender, device: torch.device) -> tuple[Callable[[], object], int]:
    """What is timed, and how many times it holds the problem."""
    if device.type != "cuda" or getattr(contender, "waits_for_device", False):
        return _runner(problem, contender), 1
    return _captured(problem, contender), problem.copies


def _side_by_side(functions: list[Callable[[], object]], device: torch.device, quick: bool) -> list[float]:
    """Median ms of each. On a GPU one call of each after the other, in an order that changes: products slow it down by
    several percent for those who come next, so that no two that are timed one after the other could be compared.
    """
    if device.type != "cuda":
        return [median_ms(function, device, quick) for function in functions]
    cache = torch.empty(2**28, dtype=torch.int8, device=device)  # five times an H100's: what calls left there is gone

    def once(function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        function()
        end.record()
        return start, end

    def elapsed(turns) -> list[list[float]]:
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) for start, end in turn] for turn in turns]

    estimate = sum(statistics.median(turn) for turn in elapsed([[once(f) for _ in range(3)] for f in functions]))
    n_calls = min(_MOST_CALLS, max(9, int((50 if quick else _MILLISECONDS) / estimate)))
    turns: list[list] = [[] for _ in functions]
    shuffled = random.Random(0)
    for _ in range(n_calls):
        for i in shuffled.sample(range(len(functions)), len(functions)):
            turns[i].append(once(functions[i]))
    return [statistics.median(turn) for turn in elapsed(turns)]


def _captured(problem: Problem, contender) -> Callable[[], None]:
    """Replays the problem on copies of the leaves, one after the other. Copies that together exceed the cache leave
    nothing in it for the next to find, and the launch of the graph is shared among them."""
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
        for _ in range(2):  # kernels are compiled and chosen before the capture
            all_runs()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_runs()

    def replay(_kept=copies) -> None:  # their memory is read every time
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
    """The cases of one op: shapes to report, small ones to try the script on, and the problems they make."""

    name: str
    shapes: list[tuple]
    quick_shapes: list[tuple]
    problems: Callable[..., list[Problem]] = field(repr=False)  # (shape, device, dtype) -> forward, and with backward
