"""The base of every layer: parameters with a role and an initial distribution, and the backends of its ops.

Constructors allocate; `init_weights` draws. A role says what a parameter is, where it is made, so that optimizers,
weight decay and initialisation never have to guess it from a shape.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from fusedlm.ops.common import AUTO

KINDS = {
    "embedding": "rows that are looked up by token; with tied embeddings the output head too",
    "head": "the projection to the vocabulary, where it has a weight of its own",
    "matrix": "a hidden matrix (fan_out, fan_in)",
    "router": "a matrix whose outputs select what a token computes",
    "gain": "the gain of a norm",
    "bias": "added before an activation, one element per output",
    "per_head": "one element per head: decay rates, step sizes, skips, gains on queries",
    "convolution": "the taps of a depthwise convolution",
    "lambda": "the weight of the noise in differential mixers, or vectors whose products give it",
    "gate": "a scalar or vector that mixes streams",
}

Init = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]  # shape -> float32 on the CPU


@dataclass(frozen=True)
class Role:
    """What a parameter is.

    kind: one of KINDS.
    fan_in, fan_out: of matrices, routers, heads and embeddings; 0 elsewhere.
    splits: rows of a packed matrix by name, in order; empty where it is one.
    """

    kind: str
    fan_in: int = 0
    fan_out: int = 0
    splits: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"role {self.kind!r} is not one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu") * self.std


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float
    high: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return self.low + (self.high - self.low) * torch.rand(shape, generator=generator, device="cpu")


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, self.value, device="cpu")


@dataclass(frozen=True)
class Orthogonal:
    """Orthonormal rows or columns, whichever are fewer, uniformly distributed (Saxe et al., arXiv 1312.6120), times
    sqrt(rows / columns) where there are more rows: elements have the variance 1 / columns of `Normal`. Packed parts
    and the matrices of a stack are drawn one by one; parts with a side below LEAST_SIDE are normal.

    splits: rows of the parts; empty: it is one.
    """

    splits: tuple[int, ...] = ()

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        *stacked, rows, columns = shape
        if stacked:
            return torch.stack([self(shape[1:], generator) for _ in range(shape[0])])
        return torch.cat([self._part(n, columns, generator) for n in self.splits or (rows,)])

    @staticmethod
    def _part(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
        if min(rows, columns) < LEAST_SIDE:
            return Normal(columns**-0.5)((rows, columns), generator)
        normal = Normal(1.0)((max(rows, columns), min(rows, columns)), generator)
        q, r = torch.linalg.qr(normal)
        q = q * r.diagonal().sign()  # without it, not uniform: the signs are LAPACK's choice
        return q.T if rows < columns else q * (rows / columns) ** 0.5


LEAST_SIDE = 64  # of matrices that start orthogonal


class OpUse(NamedTuple):
    """An op that a module runs, by the name under which it is shown, and the sizes by which its backend is chosen."""

    name: str
    op: str
    sizes: dict[str, int]


# Ops that models leave to separate layers unless `runtime.backends` names them: under torch.compile these are as fast
# (docs/results.md), and hooks see what is between them.
UNFUSED = ("rmsnorm_linear", "swiglu_mlp")
UNFUSED_REASON = "separate layers, as fast under torch.compile; name a backend to fuse them"


class Module(torch.nn.Module):
    """A torch module that declares its parameters.

    backends: op -> backend, shared by all modules of a model (`use_backends`); an op that is not named is "auto".
    """

    backends: Mapping[str, str] = {}
    branch_end: str | None = None  # of mixers and feed-forwards: the linear layer whose output is theirs

    def add_parameter(self, name: str, shape: tuple[int, ...], role: Role, init: Init) -> None:
        """Allocate a parameter; `init_weights` fills it."""
        self.register_parameter(name, torch.nn.Parameter(torch.empty(shape)))
        self.__dict__.setdefault("_declared", {})[name] = (role, init)

    def add_constant(self, name: str, value: float) -> None:
        """A number that differs per layer, as a buffer () that is saved with the parameters: compiled blocks share a
        graph, which must not contain it as a constant."""
        self.add_buffer(name, (), value)

    def add_buffer(self, name: str, shape: tuple[int, ...], value: float) -> None:
        """A float32 tensor that training does not differentiate, saved with the parameters. It starts as `value`."""
        self.register_buffer(name, torch.full(shape, value, dtype=torch.float32))
        self.__dict__.setdefault("_buffer_starts", {})[name] = value

    def backend(self, op: str) -> str:
        """The backend that this module asks an op for."""
        return self.backends.get(op, "reference" if op in UNFUSED else AUTO)

    def ops(self, device: torch.device) -> list[OpUse]:
        """The ops that this module and those inside it run on a device."""
        return []

    def waits_for_device(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a forward pass with activations in dtype needs numbers on the host, which a CUDA graph cannot give;
        of this module alone."""
        return False


def use_backends(model: torch.nn.Module, backends: Mapping[str, str]) -> None:
    """Make every module of a model run these backends from now on."""
    shared = dict(backends)
    for module in model.modules():
        if isinstance(module, Module):
            module.backends = shared


@torch.no_grad()
def init_weights(model: torch.nn.Module, seed: int | None = None) -> None:
    """Draw every declared parameter, and set every buffer to its start, of a model and what is inside it.

    Each parameter has a random stream of its own, keyed by the seed and its name, so its start depends neither on the
    device, nor on other parameters, nor on how the model is sharded.

    Args:
        seed: None: drawn from torch's global generator.
    """
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    for prefix, module in model.named_modules(remove_duplicate=True):
        for name, (_, init) in module.__dict__.get("_declared", {}).items():
            parameter = getattr(module, name)
            key = hashlib.blake2b(f"{seed} {prefix}.{name}".encode(), digest_size=8).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))
            _assign(parameter, init(tuple(parameter.shape), generator))
        for name, value in module.__dict__.get("_buffer_starts", {}).items():
            getattr(module, name).fill_(value)


def _assign(parameter: torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        values = values.to(parameter.device)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)


def roles(model: torch.nn.Module) -> dict[str, Role]:
    """The role of every parameter by its name, a shared one once.

    Raises:
        ValueError: a parameter was not declared, or by two modules.
    """
    declared: dict[int, list[Role]] = {}
    for module in model.modules():
        for name, (role, _) in module.__dict__.get("_declared", {}).items():
            declared.setdefault(id(getattr(module, name)), []).append(role)
    found = {}
    for name, parameter in model.named_parameters():
        own = declared.get(id(parameter), [])
        if len(own) != 1:
            how = "no role; declare it with Module.add_parameter" if not own else f"{len(own)} roles"
            raise ValueError(f"parameter {name} has {how}")
        found[name] = own[0]
    return found


def parameters_by_kind(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(name, kind, parameter) of each parameter, a shared one once; raises as `roles`."""
    kinds = roles(model)
    for name, parameter in model.named_parameters():
        yield name, kinds[name].kind, parameter
