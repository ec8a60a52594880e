"""Record the measurements of finished runs as one JSON file for benchmarks/results.

    python benchmarks/record_run.py RUN [RUN ...] benchmarks/results/NAME.json --command "fusedlm train ..."

Several runs are seeds of one recipe: the validation at the end is their mean, `seeds` has that of each, and all else is
of the first run. RUN/eval.json, what `fusedlm eval RUN --json` printed, is recorded where it is there.

Rates are medians over the steps after the first tenth, in which kernels compile and clocks settle. The loader's
fraction is of the total time of those steps.
"""

import argparse
import json
import statistics
from pathlib import Path

from fusedlm import load_recipe


def summarise(run: Path, name: str, command: str) -> dict:
    """The record of one run folder."""
    recipe = load_recipe(run / "recipe.yaml")
    environment = json.loads((run / "environment.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    settled = steps[len(steps) // 10 :]
    validations = [record for record in records if "val_bpb" in record]
    best = min(validations, key=lambda record: record["val_bpb"])
    seconds = sum(record["step_seconds"] for record in steps)
    waited = sum(record["loader_wait_seconds"] for record in settled)
    busy = sum(record["step_seconds"] for record in settled)
    return {
        "name": name,
        "description": recipe.description,
        "command": command,
        "date": environment["date"][:10],
        "device": environment["device_name"],
        "versions": {name: environment[name] for name in ("fusedlm", "python", "torch", "triton", "git_commit")},
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "training_seconds": round(seconds, 1),
        "tokens_per_second": round(statistics.median(record["tokens_per_second"] for record in settled), 1),
        "mfu": _median_or_none([record["mfu"] for record in settled]),
        "peak_memory_gib": round(max(record["peak_memory_bytes"] for record in steps) / 2**30, 2),
        "loader_wait_share": round(waited / busy, 5),
        "final_loss": steps[-1]["loss"],
        "val_bpb": validations[-1]["val_bpb"],
        "best_val_bpb": best["val_bpb"],
        "best_val_nll_per_token": best["val_nll_per_token"],
        "best_step": best["step"],
        "val_window": best.get("val_window"),
        "val_stride": best.get("val_stride"),
        "validation": [[record["step"], record["val_bpb"], record["val_nll_per_token"]] for record in validations],
    }


def summarise_seeds(runs: list[Path], name: str, command: str) -> dict:
    """The record of runs of one recipe that differ in their seeds.

    Raises:
        ValueError: the recipes differ in more than the seed, or two have the same.
    """
    recipes = [load_recipe(run / "recipe.yaml") for run in runs]
    seeds = [recipe.train.seed for recipe in recipes]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"runs of the same seed: {', '.join(map(str, seeds))}; name each seed once")
    for run, recipe in zip(runs, recipes, strict=True):
        if _without_seed(recipe) != _without_seed(recipes[0]):
            raise ValueError(f"{run}: not the recipe of {runs[0]} with another seed")
    records = [summarise(run, name, command) for run in runs]
    record = records[0]
    record["seeds"] = [_of_seed(*of_run) for of_run in zip(seeds, runs, records, strict=True)]
    record["val_bpb"] = statistics.mean(seed["val_bpb"] for seed in record["seeds"])
    return record


def _without_seed(recipe) -> dict:
    values = recipe.model_dump()
    values["name"] = values["train"]["seed"] = None
    return values


def _of_seed(seed: int, run: Path, record: dict) -> dict:
    """What a seed's entry of the record has."""
    step, bpb, nll_per_token = record["validation"][-1]
    entry = {"seed": seed, "step": step, "val_bpb": bpb, "val_nll_per_token": nll_per_token}
    entry["training_seconds"] = record["training_seconds"]
    if (run / "eval.json").exists():
        entry["eval"] = json.loads((run / "eval.json").read_text())
    return entry


def _median_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 4) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the runs")
    arguments = parser.parse_args()
    record = summarise_seeds(arguments.runs, arguments.out.stem, arguments.command)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "validation"}, indent=1))


if __name__ == "__main__":
    main()
