"""One training step with and without fused ops, both with torch.compile.

    python benchmarks/end_to_end.py [--out FILE] [--op NAME ...] [--turns N]

For each case: tokens per second and peak memory with the backends that the recipe selects, with the reference of every
fused op, and for each --op that the model runs with this one alone switched, to its reference or from it. In the first
case the first two are also profiled. With --turns 2 everything is measured twice, the second time in reverse order, and
the better result is kept.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_step import measure  # noqa: E402
from fusedlm import load_recipe  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402

FUSED = ("linear_softcap_cross_entropy", "differential_combine", "relu2_mlp", "swiglu_mlp", "rmsnorm_linear")
CASES = {
    "gpt-350m": ("recipes/gpt-350m.yaml", 50257, []),
    "kepler-512 cmd_mla": ("recipes/kepler-512.yaml", 65, ["model.blocks.a.mixer.type=cmd_mla"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="*", default=[], choices=FUSED, help="ops that are also switched alone")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    ops = ["--op", *arguments.op] if arguments.op else []
    command = ["python benchmarks/end_to_end.py", *ops, f"--turns {arguments.turns}"]
    record = {"name": "steps", "command": " ".join(command)}
    record |= {"environment": environment(device, resolve_dtype("auto", device))}
    cases = []
    for name, (path, vocab_size, overrides) in CASES.items():
        profiled = ("fused", "reference") if not cases else ()
        variants = measure_case(name, path, vocab_size, overrides, arguments.op, arguments.turns, profiled)
        cases.append({"name": name, "overrides": overrides, "variants": variants})
        if arguments.out:
            write_atomic(arguments.out, json.dumps(record | {"cases": cases}, indent=1) + "\n")


def measure_case(
    name: str,
    path: str,
    vocab_size: int,
    overrides: list[str],
    ops: list[str],
    turns: int,
    profiled: tuple[str, ...] = (),
    repeats: int = 8,
) -> dict[str, dict]:
    """By variant the better result of all turns; `profiled` names the variants whose kernels are profiled."""
    variants = {"fused": [], "reference": [f"runtime.backends.{op}=reference" for op in FUSED]}
    found: dict[str, dict] = {}
    for turn in range(turns):
        order = list(variants)[:: -1 if turn % 2 else 1]
        for variant in order:
            recipe = load_recipe(path, [*overrides, *variants[variant]])
            options = {"vocab_size": vocab_size, "mean_document": None, "repeats": repeats}
            result = measure(recipe, **options, profiled=turn == 0 and variant in profiled)
            better = max(result, found.get(variant, result), key=lambda r: r["tokens_per_second"])
            profile = result.get("profile") or found.get(variant, {}).get("profile")
            found[variant] = better | ({"profile": profile} if profile else {})
            if variant == "fused" and turn == 0:
                switched = _switched(result["backends"], ops)
                variants |= switched
                order += switched  # measured in this turn too
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch._C._cuda_clearCublasWorkspaces()  # one per stream that a graph was captured on
                torch.cuda.empty_cache()
            memory = "" if result["peak_memory_gib"] is None else f", {result['peak_memory_gib']:.2f} GiB"
            print(f"{name}, {variant}: {result['tokens_per_second']:,.0f} tokens/s{memory}", flush=True)
    return found


def _switched(backends: dict[str, str], ops: list[str]) -> dict[str, list[str]]:
    """By name of the variant the override that switches one op that the measured model runs."""
    variants = {}
    for op in ops:
        selected = {backend for name, backend in backends.items() if name.split(".")[-1].removeprefix("q_") == op}
        if selected == {"reference"}:
            variants[f"with {op}"] = [f"runtime.backends.{op}=auto"]
        elif selected:
            variants[f"{op} by reference"] = [f"runtime.backends.{op}=reference"]
    return variants


if __name__ == "__main__":
    main()
