"""Choosing an implementation once, when a model is built, and saying why."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Setting:
    """What is known of the hardware and the run when a choice is made."""

    device: torch.device
    dtype: torch.dtype  # of the inputs that the op will see (autocast's when that is on)
    deterministic: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability, (0, 0) elsewhere."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `supports(setting, **shape)` is None, or the reason why it cannot run."""

    name: str
    function: Callable | str  # or "module:name", imported when it is chosen: only GPUs need the kernels
    supports: Callable[..., str | None]

    def load(self) -> Callable:
        if not isinstance(self.function, str):
            return self.function
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and why it and no faster one."""

    op: str
    name: str
    reason: str
    function: Callable = field(repr=False, compare=False)


class Op:
    """An operation with its implementations, fastest first and the reference last."""

    def __init__(self, name: str, implementations: list[Implementation], **typical_shape):
        self.name = name
        self.implementations = {implementation.name: implementation for implementation in implementations}
        self.typical_shape = typical_shape  # what `fusedlm doctor` asks about
        OPS[name] = self

    def reasons(self, setting: Setting, **shape) -> dict[str, str | None]:
        """For each implementation None when it can run, else the reason why it cannot."""
        return {name: i.supports(setting, **shape) for name, i in self.implementations.items()}

    def choose(self, requested: str, setting: Setting, **shape) -> Choice:
        """The implementation named, or with `auto` the first that can run.

        Raises:
            ValueError: the name is unknown, or that implementation cannot run here; nothing falls back silently.
        """
        reasons = self.reasons(setting, **shape)
        if requested == "auto":
            passed_over = []
            for name, reason in reasons.items():
                if reason is None:
                    why = "; ".join(passed_over) or ("the fastest" if len(reasons) > 1 else "the only one")
                    return Choice(self.name, name, why, self.implementations[name].load())
                passed_over.append(f"{name}: {reason}")
            raise ValueError(f"op {self.name}: no implementation can run here ({'; '.join(passed_over)})")
        if requested not in reasons:
            raise ValueError(f"op {self.name}: unknown implementation {requested!r}; known: {', '.join(reasons)}")
        if reasons[requested] is not None:
            raise ValueError(f"op {self.name}: implementation {requested!r} cannot run: {reasons[requested]}; use auto")
        return Choice(self.name, requested, "asked for", self.implementations[requested].load())


OPS: dict[str, Op] = {}

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def needs_triton(setting: Setting) -> str | None:
    """None where our Triton kernels run, else what is missing."""
    if setting.device.type != "cuda":
        return f"needs a CUDA device, not {setting.device.type}"
    if setting.dtype not in _TRITON_DTYPES:
        return f"needs bfloat16, float16 or float32, not {str(setting.dtype).removeprefix('torch.')}"
    if setting.capability < (8, 0):
        return f"needs compute capability 8.0, this is {'.'.join(map(str, setting.capability))}"
    return None if importlib.util.find_spec("triton") else "triton is not installed"
