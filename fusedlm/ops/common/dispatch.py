"""Backend selection: resolved from the tensors of a call, cached, logged once, explained on request."""

import contextlib
import functools
import importlib
import importlib.util
import logging
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

_log = logging.getLogger("fusedlm.ops")

AUTO = "auto"


@dataclass(frozen=True)
class Call:
    """What a backend is selected by, besides sizes."""

    device: torch.device
    dtype: torch.dtype  # of the tensors that are multiplied or summed
    deterministic: bool = False  # torch.use_deterministic_algorithms is on

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability, (0, 0) elsewhere."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


def runs_anywhere(call: Call, **sizes: int) -> str | None:
    """`supports` of a backend without requirements."""
    return None


class Backend:
    """One implementation of an op.

    Args:
        name: as users give it.
        function: takes what the op's public function passes on; or "module:name", imported when the backend is first
            selected, since only GPUs need the kernels.
        supports: (call, **sizes) -> None, or the reason why it cannot run.
        fused: False: it computes one step after another, as modules that use the op can with their own layers.
    """

    def __init__(
        self,
        name: str,
        function: Callable | str,
        supports: Callable[..., str | None] = runs_anywhere,
        *,
        fused: bool = True,
    ):
        self.name, self.supports, self.fused = name, supports, fused
        self._source = function
        self.run: Callable | None = None if isinstance(function, str) else function  # None until it is loaded

    def load(self) -> None:
        """Import the function."""
        if self.run is None:
            module, name = self._source.split(":")
            self.run = getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class BackendSelection:
    """The backend that runs, why, and why others cannot."""

    op: str
    backend: str
    reason: str
    unsupported: dict[str, str] = field(default_factory=dict)  # backend -> why it cannot run

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        return "\n".join([*lines, *(f"  {name} cannot run: {why}" for name, why in self.unsupported.items())])


class Op:
    """An operation and its backends, the fastest first.

    Args:
        name: the key in `runtime.backends`.
        backends: the last one, the reference, runs anywhere.
        function: name of the public function in `fusedlm.ops`; None: that of the op.
        typical_sizes: what `explain` and `fusedlm doctor` assume where no sizes are given.
    """

    def __init__(self, name: str, backends: list[Backend], *, function: str | None = None, **typical_sizes: int):
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.function = function or name
        self.typical_sizes = typical_sizes
        OPS[name] = self

    def select(self, requested: str, call: Call, **sizes: int) -> BackendSelection:
        """The backend named, or with "auto" the first that can run.

        Raises:
            ValueError: the backend or a size is unknown, or that backend cannot run this call.
        """
        self.check_name(requested)
        for size in sizes:
            if size not in self.typical_sizes:
                known = ", ".join(self.typical_sizes) or "none"
                raise ValueError(f"op {self.name}: unknown size {size!r}; its sizes: {known}")
        sizes = self.typical_sizes | sizes
        unsupported, first = {}, None
        for name, backend in self.backends.items():
            reason = backend.supports(call, **sizes)
            if reason is not None:
                unsupported[name] = reason
            elif first is None:
                first = name
        if requested == AUTO:
            if first is None:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items())
                raise ValueError(f"op {self.name}: no backend can run here ({reasons})")
            faster = list(self.backends)[: list(self.backends).index(first)]
            skipped = "; ".join(f"{name}: {unsupported[name]}" for name in faster)
            reason = skipped or ("the fastest" if len(self.backends) > 1 else "the only one")
            return BackendSelection(self.name, first, reason, unsupported)
        if requested in unsupported:
            raise ValueError(f"op {self.name}: backend {requested!r} cannot run: {unsupported[requested]}; use 'auto'")
        return BackendSelection(self.name, requested, "requested", unsupported)

    def check_name(self, requested: str) -> None:
        """Raises ValueError unless this is "auto" or the name of a backend."""
        if requested != AUTO and requested not in self.backends:
            known = ", ".join([AUTO, *self.backends])
            raise ValueError(f"op {self.name}: unknown backend {requested!r}; one of {known}")


OPS: dict[str, Op] = {}


def resolve(op: str, backend: str, like: torch.Tensor, *, dtype: torch.dtype | None = None, **sizes: int) -> Callable:
    """The function of the backend that runs a call.

    Args:
        op: name of the op.
        backend: as its public function takes it.
        like: a tensor with the call's device and, unless `dtype` is given, its dtype.
        sizes: what the op's backends are selected by.

    Raises:
        ValueError: the backend is unknown or cannot run this call.
    """
    return OPS[op].backends[_resolved(op, backend, like, dtype, sizes)].run


def runs_fused(op: str, backend: str, like: torch.Tensor, *, dtype: torch.dtype | None = None, **sizes: int) -> bool:
    """Whether the backend that `resolve` would give is a fused one. A module whose op is not fused computes the steps
    with its own layers, whose outputs hooks can then see."""
    return OPS[op].backends[_resolved(op, backend, like, dtype, sizes)].fused


def _resolved(op: str, backend: str, like: torch.Tensor, dtype: torch.dtype | None, sizes: dict[str, int]) -> str:
    # index: under torch.compile a size may be symbolic, and the name holds for one value of it.
    fixed = tuple((name, operator.index(size)) for name, size in sizes.items())
    return _resolved_name(
        op, backend, like.device, dtype or like.dtype, torch.are_deterministic_algorithms_enabled(), fixed
    )


# torch.compile calls this while it traces; the name is a constant of the graph.
@torch.compiler.assume_constant_result
def _resolved_name(op, backend, device, dtype, deterministic, sizes) -> str:
    name = _select(op, backend, device, dtype, deterministic, sizes)
    for record in _records:
        record.append((op, name, dict(sizes)))
    return name


@functools.cache
def _select(op, backend, device, dtype, deterministic, sizes) -> str:
    selection = OPS[op].select(backend, Call(device, dtype, deterministic), **dict(sizes))
    OPS[op].backends[selection.backend].load()
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    _log.info("%s on %s: %s (%s)", op, where, selection.backend, selection.reason)
    return selection.backend


def explain(
    op: str | Callable,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str = AUTO,
    deterministic: bool = False,
    **sizes: int,
) -> BackendSelection:
    """Which backend of an op would run, and why others cannot; print it to read it.

    Args:
        op: a function of `fusedlm.ops`, or its name or that of its op.
        device: None: "cuda" where there is one, else "cpu".
        dtype: None: bfloat16 on CUDA devices, float32 elsewhere.
        backend: as the function takes it.
        deterministic: as if torch.use_deterministic_algorithms were on.
        sizes: what the op's backends are selected by (`OPS[name].typical_sizes` names them); those not given have
            typical values.

    Raises:
        ValueError: the op, the backend or a size is unknown, there is no such device, or the backend cannot run there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device; use 'cpu'")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return _find(op).select(backend, Call(device, dtype, deterministic), **sizes)


def _find(op: str | Callable) -> Op:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    for known in OPS.values():
        if name in (known.name, known.function):
            return known
    raise ValueError(f"there is no op {name!r}; one of {', '.join(OPS)}")


def check_backends(backends: dict[str, str], where: str = "backends") -> None:
    """Raises ValueError, naming `where`, unless every key is an op and every value one of its backends or "auto"."""
    for name, backend in backends.items():
        if name not in OPS:
            raise ValueError(f"{where}.{name}: there is no such op; one of {', '.join(OPS)}")
        try:
            OPS[name].check_name(backend)
        except ValueError as error:
            raise ValueError(f"{where}.{name}: {error}") from None


_records: list[list[tuple[str, str, dict]]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, str, dict]]]:
    """A list of (op, backend, sizes), one for each call resolved inside the context; under torch.compile for each call
    resolved while it traces."""
    record: list[tuple[str, str, dict]] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def forget() -> None:
    """Clear the cache, after a change to an op's backends."""
    _select.cache_clear()


_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def needs_triton(call: Call, **sizes: int) -> str | None:
    """`supports` of our Triton kernels."""
    if call.device.type != "cuda":
        return f"needs a CUDA device, not {call.device.type}"
    if call.dtype not in _TRITON_DTYPES:
        return f"needs bfloat16, float16 or float32, not {str(call.dtype).removeprefix('torch.')}"
    if call.capability < (8, 0):
        return f"needs compute capability 8.0, this is {'.'.join(map(str, call.capability))}"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def needs_hopper_matmul(call: Call) -> str | None:
    """`supports` of our matrix products on tensor cores, whose tiles suit Hopper and its successor."""
    if reason := needs_triton(call):
        return reason
    if call.dtype == torch.float32:
        return "needs bfloat16 or float16, for tensor cores"
    if call.capability[0] not in (9, 10):
        return f"tuned for compute capability 9 and 10, this is {'.'.join(map(str, call.capability))}"
    return None
