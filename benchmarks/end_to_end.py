"""One training step with the fused ops and without, torch.compile on in both.

    python benchmarks/end_to_end.py [--out FILE] [--op NAME ...]

For each case: tokens a second and peak memory with what the recipe chooses, with the reference of every fused op, and
with --op with only that one switched, to its reference or from it, where the model has it; for the first case the ten
heaviest kernels of either end. With --turns 2 every measurement is made twice, the second time in reverse order, and
the better is kept.
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
from fusedlm.train.hardware import environment  # noqa: E402

FUSED = (
    "linear_softcap_cross_entropy", "softcap_cross_entropy", "differential_combine", "relu2_mlp", "swiglu_mlp",
    "rmsnorm_linear",
)  # fmt: skip
CASES = {
    "gpt-350m": ("recipes/gpt-350m.yaml", 50257, []),
    "kepler-512 cmd_mla": ("recipes/kepler-512.yaml", 65, ["model.blocks.a.mixer.type=cmd_mla"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="*", default=[], choices=FUSED, help="of which the share is shown by itself")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    shares = ["--op", *arguments.op] if arguments.op else []
    command = ["python benchmarks/end_to_end.py", *shares, f"--turns {arguments.turns}"]
    record = {"name": "steps", "command": " ".join(command)}
    record |= {"environment": environment(device, resolve_dtype("auto", device))}
    cases = []
    for name, (path, vocab_size, overrides) in CASES.items():
        ways = {"fused": [], "reference": [f"model.impl.{op}=reference" for op in FUSED]}
        found = {}
        for turn in range(arguments.turns):
            order = list(ways)[:: -1 if turn % 2 else 1]
            for way in order:
                recipe = load_recipe(path, [*overrides, *ways[way]])
                profiled = turn == 0 and not cases and way in ("fused", "reference")
                result = measure(recipe, vocab_size=vocab_size, mean_document=None, repeats=8, profiled=profiled)
                kept = max(result, found.get(way, result), key=lambda r: r["tokens_per_second"])
                profile = result.get("profile") or found.get(way, {}).get("profile")
                found[way] = kept | ({"profile": profile} if profile else {})
                if way == "fused" and turn == 0:
                    switched = _switched(result["implementations"], arguments.op)
                    ways |= switched
                    order += switched  # and this turn goes on with them
                torch._dynamo.reset()
                gc.collect()
                if torch.cuda.is_available():
                    torch._C._cuda_clearCublasWorkspaces()  # one for each stream that a graph was captured on
                    torch.cuda.empty_cache()
                memory = "" if result["peak_memory_gib"] is None else f", {result['peak_memory_gib']:.2f} GiB"
                print(f"{name}, {way}: {result['tokens_per_second']:,.0f} tokens/s{memory}", flush=True)
        cases.append({"name": name, "overrides": overrides, "ways": found})
        if arguments.out:
            write_atomic(arguments.out, json.dumps(record | {"cases": cases}, indent=1) + "\n")


def _switched(implementations: dict[str, str], ops: list[str]) -> dict[str, list[str]]:
    """Overrides that give each of the ops which a measured model has its other implementation, by what to call them."""
    ways = {}
    for op in ops:
        chosen = {choice for name, choice in implementations.items() if name.split(".")[-1] == op}
        if chosen == {"reference"}:
            ways[f"with {op}"] = [f"model.impl.{op}=auto"]
        elif chosen:
            ways[f"{op} by reference"] = [f"model.impl.{op}=reference"]
    return ways


if __name__ == "__main__":
    main()
