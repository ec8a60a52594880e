"""The kernels of a profiled function by time, each with the floor that the measured rates of the device set."""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness import Ceilings

_BYTES = {
    "float": 4,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "long int": 8,
    "int": 4,
    "bool": 1,
    "unsigned char": 1,
    "double": 8,
}
_NEAR = 0.8  # fraction of the floor

# Kernels of `fusedlm.ops`, by the op that launches them. These compute matrix products:
PRODUCTS = {"relu2_mlp": ("_up_kernel", "_down_backward_kernel"), "rmsnorm_linear": ("_scaled_matmul_kernel",)}
# These read or write a matrix so many times: the logits, the heads, x, half of the packed projection. A gated norm with
# a skip reads one more, mix_inputs what it adds to x, exclude_own_value the values.
PASSES = {
    "softcap_cross_entropy": {
        "forward_kernel": 1,
        "backward_kernel": 2,
        "loss_and_gradient_kernel": 2,
        "full_rows_kernel": 2,
    },
    "differential_combine": {"_forward_kernel": 3, "_backward_kernel": 5},
    "gated_rmsnorm": {"_forward_kernel": 3, "_backward_kernel": 5},
    "mix_inputs": {"_forward_kernel": 3, "_backward_kernel": 4},
    "exclude_own_value": {"_forward_kernel": 2, "_backward_kernel": 3},
    "short_conv": {"forward_kernel": 2, "backward_kernel": 3},
    "rmsnorm_linear": {"_normalise_kernel": 2, "_backward_kernel": 4},
    "swiglu_mlp": {"_forward_kernel": 3, "_backward_kernel": 6},
}
_LOSSES_ONLY = (
    "fusedlm::softcap_cross_entropy",
    "fusedlm::reduced_softcap_cross_entropy_loss",
    "fusedlm::linear_softcap_cross_entropy_losses",
)


@dataclass
class Row:
    """All calls of one kernel."""

    kernel: str
    op: str  # what launched it
    calls: int
    milliseconds: float
    floor_ms: float | None  # None: neither its FLOPs nor its bytes are known

    @property
    def share_of_floor(self) -> float | None:
        return None if self.floor_ms is None else self.floor_ms / self.milliseconds


def kernel_table(function: Callable[[], object], ceilings: Ceilings) -> list[Row]:
    """The kernels of one call on the current CUDA device, the slowest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return rows_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], ceilings)


def rows_of(events: list[dict], ceilings: Ceilings) -> list[Row]:
    """From the events of a Chrome trace. A kernel's floor is that of the op that launched it, counted once per call of
    the op, however many launches it took."""
    launched_by = {
        event["args"]["External id"]: event
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    rows: dict[tuple[str, str], Row] = {}
    counted: set[tuple[str, int]] = set()
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        number = event["args"].get("External id")
        op = launched_by.get(number)
        name = event["name"]
        by = op["name"] if op else ""
        # Kernels of several of our ops may have the same name.
        row = rows.setdefault((name, by if by.startswith("fusedlm::") else ""), Row(name, by, 0, 0.0, 0.0))
        row.calls += 1
        row.milliseconds += event["dur"] / 1e3
        floor = _floor_ms(name, op, ceilings) if op else None
        if floor is None or row.floor_ms is None:
            row.floor_ms = None
        elif (name, number) not in counted:
            counted.add((name, number))
            row.floor_ms += floor
    return sorted(rows.values(), key=lambda row: -row.milliseconds)


def summary(rows: list[Row]) -> dict:
    """Of all kernels: the ten slowest, the fractions of time near the floor and of unknown floor, and for each kind of
    op its time and how much of it is above known floors."""
    total = sum(row.milliseconds for row in rows)
    near = sum(r.milliseconds for r in rows if r.share_of_floor is not None and r.share_of_floor >= _NEAR)
    unknown = sum(row.milliseconds for row in rows if row.floor_ms is None)
    groups: dict[str, dict] = {}
    for row in rows:
        group = groups.setdefault(_group(row), {"milliseconds": 0.0, "above_floor_ms": 0.0, "unknown_floor_ms": 0.0})
        group["milliseconds"] += row.milliseconds
        if row.floor_ms is None:
            group["unknown_floor_ms"] += row.milliseconds
        else:
            group["above_floor_ms"] += max(0.0, row.milliseconds - row.floor_ms)
    return {
        "kernel_ms": total,
        "share_near_floor": near / total,
        "share_of_unknown_floor": unknown / total,
        "groups": groups,
        "heaviest": [asdict(row) for row in rows[:10]],
    }


def _group(row: Row) -> str:
    if row.kernel.startswith("triton_"):
        return "compiled"
    if row.op in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "matrix products"
    if row.op.startswith("fusedlm::"):
        return "fused ops"
    if "attention" in row.op:
        return "attention"
    return "optimizer" if "adamw" in row.op else "other"


def _floor_ms(kernel: str, op: dict, ceilings: Ceilings) -> float | None:
    dims, types = op["args"].get("Input Dims"), op["args"].get("Input type")
    if not dims:
        return None
    flops = _flops_of_ours(kernel, op["name"], dims) or _flops(op["name"], dims)
    if flops is not None and not kernel.startswith("triton_"):
        return 1e3 * flops / ceilings.flops_per_second
    if op["name"].startswith("fusedlm::"):
        moved = _moved_by_ours(kernel, op["name"], dims)
    elif "_fused_adamw" in op["name"]:
        moved = sum(map(math.prod, dims[0])) * 28  # weights and both moments are read and written, gradients read
    elif kernel.startswith("triton_"):
        moved = _bytes(dims, types)
    else:
        return None
    return None if not moved else 1e3 * moved / ceilings.bytes_per_second


def _bytes(dims, types) -> int:
    """Bytes of the tensor arguments, each counted once."""
    return sum(math.prod(size) * _BYTES.get(kind, 0) for size, kind in zip(dims, types, strict=True) if size)


def _flops(op: str, dims) -> float | None:
    """FLOPs of a matrix product or of causal attention."""
    if op in ("aten::mm", "aten::bmm"):
        return 2.0 * math.prod(dims[0]) * dims[1][-1]
    if op == "aten::addmm":
        return 2.0 * math.prod(dims[1]) * dims[2][-1]
    if "attention" in op and len(dims) > 2:
        tensors = [size for size in dims if len(size) == 4]
        if "backward" in op:
            (*_, value_dim), q, k = tensors[:3]  # the upstream gradient comes first
            return 2.5 * _attention_flops(q, k, value_dim)
        return _attention_flops(tensors[0], tensors[1], tensors[2][-1])
    return None


def _attention_flops(q, k, value_dim: int) -> float:
    """FLOPs of causal attention, q and k (B, H, T, E)."""
    batch, heads, n_queries, head_dim = q
    return 1.0 * batch * heads * n_queries * k[2] * (head_dim + value_dim)


def _flops_of_ours(kernel: str, op: str, dims) -> float | None:
    """FLOPs of the kernels of `fusedlm.ops` that multiply matrices, x (N, D) and a weight (H, D)."""
    if not any(op.startswith(f"fusedlm::{name}") and kernel in kernels for name, kernels in PRODUCTS.items()):
        return None
    if "relu2_mlp" in op:
        x, weight = dims[1:3] if "backward" in op else dims[:2]
    else:
        x, weight = dims[0], dims[2]
    return 2.0 * math.prod(x) * weight[0]


def _moved_by_ours(kernel: str, op: str, dims) -> int | None:
    """Bytes that the kernels of `fusedlm.ops` read and write of a bfloat16 matrix."""
    family = next((name for name in PASSES if name in op), None)
    passes = PASSES.get(family, {}).get(kernel)
    if passes is None:
        return None
    matrices = [size for size in dims if len(size) >= 2]
    if family == "softcap_cross_entropy":
        if op in _LOSSES_ONLY:
            passes = 1  # full_rows_kernel too
        elements = matrices[0][0] * matrices[1][0] if "linear" in op else math.prod(matrices[0])
    elif family == "swiglu_mlp":
        x, w_gate_up = matrices[1:3] if "backward" in op else matrices[:2]
        elements = x[0] * w_gate_up[0] // 2
    elif family == "short_conv":
        elements = math.prod(dims[1] if "backward" in op else dims[0])
    elif family == "exclude_own_value":
        y, v = matrices[-2:]
        return 2 * (passes * math.prod(y) + (passes - 1) * math.prod(v))
    else:
        if family == "mix_inputs":  # what is added is read, and its gradient written
            passes += 2 * (len(matrices) - 3) if "backward" in op else len(matrices) - 1
        if family == "gated_rmsnorm":
            passes += sum(len(size) == 4 for size in dims) - (3 if "backward" in op else 2)
        elements = math.prod(matrices[1] if op == "fusedlm::rmsnorm_linear_backward" else matrices[0])
    return 2 * passes * elements or None
