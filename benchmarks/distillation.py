"""Train a student with and without a teacher, in equal steps, and compare their bits per byte.

    python benchmarks/distillation.py STUDENT TEACHER [key=value ...] [--weights 0.5 0.9] [--temperatures 1 2]
        [--format int8] [--seeds 0 1 2] [--runs FOLDER] [--out FILE]

STUDENT is a recipe, TEACHER a run folder or a folder that Transformers reads, with the student's tokenizer. Plain
training and each pair of weight and temperature train once per seed, on the same batches from the same first weights.
Runs that are in FOLDER and finished are not trained again. For a 27M student of a 350M teacher on one GPU:

    fusedlm train recipes/gpt-350m.yaml --out runs/teacher
    python benchmarks/distillation.py recipes/golf-27m.yaml runs/teacher 'data={...of the teacher...}' \\
        --weights 0.5 0.9 --temperatures 1 2 --seeds 0 1 2 --out benchmarks/results/distillation-27m.json
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedlm import load_recipe  # noqa: E402
from fusedlm.compare.statistics import summarise  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402
from fusedlm.runs.metrics import read_metrics  # noqa: E402
from fusedlm.train import train  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--weights", nargs="+", type=float, metavar="w", default=[0.5])
    parser.add_argument("--temperatures", nargs="+", type=float, metavar="T", default=[1.0])
    parser.add_argument("--format", help="of the teacher's hidden matrices")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="seed", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    variants = {"plain": []}
    for weight in arguments.weights:
        for temperature in arguments.temperatures:
            chosen = [f"train.distill.weight={weight}", f"train.distill.temperature={temperature}"]
            chosen += [f"train.distill.format={arguments.format}"] if arguments.format else []
            variants[f"w{weight:g}-T{temperature:g}"] = [f"train.distill.teacher={arguments.teacher}", *chosen]
    found: dict[str, dict[int, dict]] = {name: {} for name in variants}
    for seed in arguments.seeds:
        for name, overrides in variants.items():
            recipe = load_recipe(arguments.student, [*arguments.overrides, f"train.seed={seed}", *overrides])
            found[name][seed] = _trained(recipe, arguments.runs / f"{recipe.name}-{name}-seed{seed}")
            print(f"{name:12} seed {seed}  {found[name][seed]['val_bpb']:.4f} bits per byte", flush=True)
            if arguments.out:  # so that a run that is stopped leaves a record
                record = _record(arguments, found, recipe)
                write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def _trained(recipe, run: Path) -> dict:
    """Validation and speed of a finished run, which is trained first if it is not."""
    if train(recipe, run, resume=run.exists()).stopped_by_signal:
        raise SystemExit("stopped by a signal; run it again to resume")
    metrics, _ = read_metrics(run / "metrics.jsonl")
    steps = [record for record in metrics if "loss" in record]
    last = [record for record in metrics if "val_bpb" in record][-1]
    tail = steps[-max(1, len(steps) // 10) :]
    return {
        "val_bpb": last["val_bpb"],
        "val_nll_per_token": last["val_nll_per_token"],
        "train_loss": statistics.mean(record["loss"] for record in tail),
        "train_kl": statistics.mean(r["distill_kl"] for r in tail) if "distill_kl" in tail[-1] else None,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steps),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in steps),
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
    }


def _record(arguments, found: dict[str, dict[int, dict]], recipe) -> dict:
    device = resolve_device(recipe.runtime.device)
    machine = environment(device, resolve_dtype(recipe.runtime.dtype, device))
    rows, plain = [], found["plain"]
    for name, seeds in found.items():
        if seeds:
            gain = summarise([plain[s]["val_bpb"] - of["val_bpb"] for s, of in seeds.items()])
            speed = statistics.median(of["tokens_per_second"] for of in seeds.values())
            mean = statistics.mean(of["val_bpb"] for of in seeds.values())
            memory = max(of["peak_memory_bytes"] for of in seeds.values())
            row = {"variant": name, "val_bpb": mean, "tokens_per_second": speed, "peak_memory_bytes": memory}
            if name != "plain":
                row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row | {"seeds": {str(seed): of for seed, of in seeds.items()}})
    return {
        "name": recipe.name,
        "command": shlex.join(["python", "benchmarks/distillation.py", *sys.argv[1:]]),
        "date": machine["date"][:10],
        "device": machine["device_name"],
        "versions": {name: machine[name] for name in ("fusedlm", "python", "torch", "triton", "git_commit")},
        "threads": torch.get_num_threads(),
        "steps": recipe.train.steps,
        "tokens_per_step": recipe.train.batch_size * recipe.train.seq_len,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
