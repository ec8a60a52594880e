"""The kernels of a profiled function by time, each beside the floor that the device's ceilings set."""

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
_NEAR = 0.8  # of the floor


@dataclass
class Row:
    """All calls of one kernel."""

    kernel: str
    op: str  # what launched it
    calls: int
    milliseconds: float
    floor_ms: float | None  # None: neither products nor the sizes of its arguments are known

    @property
    def share_of_floor(self) -> float | None:
        return None if self.floor_ms is None else self.floor_ms / self.milliseconds


def kernel_table(function: Callable[[], object], ceilings: Ceilings) -> list[Row]:
    """The kernels of one call on the current CUDA device, the heaviest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return rows_of(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], ceilings)


def rows_of(events: list[dict], ceilings: Ceilings) -> list[Row]:
    """From the events of a Chrome trace: a kernel's floor is that of the op which launched it, once a launch of the op
    however many of its calls that took."""
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
        # Our kernels have short names, of which one may stand in several ops.
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
    """Of all kernels: the ten heaviest, and the shares of time near the floor and of unknown floor."""
    total = sum(row.milliseconds for row in rows)
    near = sum(r.milliseconds for r in rows if r.share_of_floor is not None and r.share_of_floor >= _NEAR)
    unknown = sum(row.milliseconds for row in rows if row.floor_ms is None)
    return {
        "kernel_ms": total,
        "share_near_floor": near / total,
        "share_of_unknown_floor": unknown / total,
        "heaviest": [asdict(row) for row in rows[:10]],
    }


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
        moved = sum(map(math.prod, dims[0])) * 28  # weights and both moments read and written, gradients read
    elif kernel.startswith("triton_"):
        moved = _bytes(dims, types)
    else:
        return None
    return None if not moved else 1e3 * moved / ceilings.bytes_per_second


def _bytes(dims, types) -> int:
    """Of the tensors among the arguments, each counted once."""
    return sum(math.prod(size) * _BYTES.get(kind, 0) for size, kind in zip(dims, types, strict=True) if size)


def _flops(op: str, dims) -> float | None:
    """Of a matrix product or of causal attention."""
    if op in ("aten::mm", "aten::bmm"):
        return 2.0 * math.prod(dims[0]) * dims[1][-1]
    if op == "aten::addmm":
        return 2.0 * math.prod(dims[1]) * dims[2][-1]
    if "attention" in op and len(dims) > 2:
        tensors = [size for size in dims if len(size) == 4]
        if "backward" in op:
            (*_, width_v), q, k = tensors[:3]  # the upstream gradient comes first
            return 2.5 * _attention_flops(q, k, width_v)
        return _attention_flops(tensors[0], tensors[1], tensors[2][-1])
    return None


def _attention_flops(q, k, width_v: int) -> float:
    """Causal, (B, H, T, E)."""
    batch, heads, n_queries, width = q
    return 1.0 * batch * heads * n_queries * k[2] * (width + width_v)


def _flops_of_ours(kernel: str, op: str, dims) -> float | None:
    """Of the kernels of `fusedlm.ops` that multiply matrices."""
    if kernel in ("_up_kernel", "_down_backward_kernel"):
        x, w_up = dims[1:3] if "backward" in op else dims[:2]
        return 2.0 * math.prod(x) * w_up[0]
    return None


def _moved_by_ours(kernel: str, op: str, dims) -> int | None:
    """Bytes of the kernels of `fusedlm.ops`, in bfloat16."""
    if "softcap_cross_entropy" in op and len(dims[0]) == 2:
        linear = "linear" in op
        logits = dims[0][0] * (dims[1][0] if linear else dims[0][1]) * 2
        passes = {"_forward_kernel": 1, "_backward_kernel": 2, "_both_kernel": 2, "_whole_rows_kernel": 2}
        return passes.get(kernel, 0) * logits or None
    if op.startswith("fusedlm::differential_combine"):
        return math.prod(dims[0]) * 2 * {"_forward_kernel": 3, "_backward_kernel": 5}.get(kernel, 0) or None
    return None
