"""Time the ops against eager PyTorch, torch.compile and other libraries, in one run on one device.

    python benchmarks/run.py [op ...] [--contenders NAME ...] [--shapes 32x2048 ...] [--quick] [--device cuda]
        [--out FILE]

Every contender is checked against float64 first. A kernel of ours that is less exact than twice eager PyTorch has no
time; a peer's time is marked and shown with its error. The floor is the time of the fewest bytes at the bandwidth of a
copy, or of the FLOPs at the rate of a large matrix product, whichever is longer; both rates are measured in the same
run. --contenders: those alone, and eager PyTorch, whose error sets the bound. --shapes: of each op those that begin or
end with the sizes. --quick uses tiny shapes, to try the
script where there is no GPU (TRITON_INTERPRET=1).
"""

import argparse
import gc
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cases import OPS  # noqa: E402
from benchmarks.harness import Ceilings, Measured, Problem, measure, measure_ceilings  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"{', '.join(OPS)}; default: all")
    parser.add_argument("--contenders", nargs="+", metavar="name", help="such as fusedlm; default: all")
    parser.add_argument("--shapes", nargs="+", metavar="sizes", default=[], help="such as 32x2048 or 16x128")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.ops if name not in OPS]:
        parser.error(f"unknown op {', '.join(unknown)}; one of {', '.join(OPS)}")
    device = resolve_device(arguments.device)
    dtype = resolve_dtype("auto", device)
    torch.manual_seed(0)
    ceilings = measure_ceilings(device, dtype, arguments.quick)
    rates = f"copy {ceilings.bytes_per_second / 1e9:,.0f} GB/s, matrix product "
    print(f"{rates}{ceilings.flops_per_second / 1e12:,.1f} TFLOP/s", flush=True)
    command = ["python", "benchmarks/run.py", *arguments.ops]
    if arguments.contenders:
        command += ["--contenders", *arguments.contenders]
    if arguments.shapes:
        command += ["--shapes", *arguments.shapes]
    command += ["--quick"] * arguments.quick
    record = {"name": "ops", "command": shlex.join(command), "environment": environment(device, dtype)}
    record |= {"ceilings": asdict(ceilings), "cases": []}
    for name in arguments.ops or OPS:
        op = OPS[name]
        for shape in _wanted(op.quick_shapes if arguments.quick else op.shapes, arguments.shapes):
            for problem in op.problems(shape, device, dtype):
                if arguments.contenders:
                    problem.contenders = _chosen(problem.contenders, arguments.contenders)
                record["cases"].append(_record(problem, ceilings, measure(problem, device, arguments.quick)))
                print(_lines(record["cases"][-1]), flush=True)
            del problem
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if arguments.out:  # after every shape, so that a run that is stopped leaves a record
                write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def _wanted(shapes: list[tuple[int, ...]], parts: list[str]) -> list[tuple[int, ...]]:
    """The shapes that begin or end with the sizes of a part, such as 32x2048; without parts all."""

    def fits(shape: tuple[int, ...], part: str) -> bool:
        name, part = f"x{'x'.join(map(str, shape))}x", f"x{part}x"
        return name.startswith(part) or name.endswith(part)

    return [shape for shape in shapes if not parts or any(fits(shape, part) for part in parts)]


def _chosen(contenders: dict, names: list[str]) -> dict:
    """The first, eager PyTorch, and those of the names."""
    first, *others = contenders
    return {name: contenders[name] for name in [first, *(name for name in others if name in names)]}


def _record(problem: Problem, ceilings: Ceilings, measured: list[Measured]) -> dict:
    return {
        "op": problem.op,
        "shape": problem.shape,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "direction": problem.direction,
        "bytes": problem.n_bytes,
        "flops": problem.n_flops,
        "floor_ms": ceilings.floor_ms(problem),
        "contenders": [asdict(one) for one in measured],
    }


def _lines(case: dict) -> str:
    lines = [f"{case['op']}  {case['shape']}  {case['dtype']}  {case['direction']}  floor {case['floor_ms']:.4f} ms"]
    for one in case["contenders"]:
        error = f"error {max(one['errors']):.1e}" if one["errors"] else ""
        if (one["error_over_bound"] or 0) > 1:
            error += f", less exact: up to {one['error_over_bound']:.2g} times the bound"
        if one["milliseconds"] is None:
            lines.append(f"  {one['name']:15} {one['reason']} {error}")
            continue
        extra = "" if one["extra_mib"] is None else f"  +{one['extra_mib']:,.0f} MiB"
        fraction = case["floor_ms"] / one["milliseconds"]
        lines.append(f"  {one['name']:15} {one['milliseconds']:9.4f} ms  {fraction:6.1%} of the floor  {error}{extra}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
