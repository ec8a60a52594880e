"""Record finished folders of `fusedlm golf` as one JSON file for benchmarks/results.

    python benchmarks/record_golf.py FOLDER [FOLDER ...] --out benchmarks/results/golf-runs.json --note "..."

A folder has `run/`, and golf.json where its model was packed; one without it is recorded as a training alone. Of a
training: seconds of all steps, in which kernels compile too, and its validations.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record_run import summarise  # noqa: E402
from fusedlm import load_recipe  # noqa: E402
from fusedlm.cli.golf_run import RECORD, RUN  # noqa: E402

SCORES = ("float", "plain", "sliding")
KEPT = ("bytes", "limit", "code_bytes", "bits_per_weight", "files_tried", "weights", "seconds", *SCORES)


def summarise_golf(folder: Path) -> dict:
    """Training and file of one folder.

    Raises:
        ValueError: it has no run.
    """
    if not (folder / RUN / "recipe.yaml").exists():
        raise ValueError(f"{folder}: no folder of fusedlm golf, which has {RUN}/recipe.yaml")
    recipe = load_recipe(folder / RUN / "recipe.yaml")
    training = summarise(folder / RUN, recipe.name, "")
    row = {"recipe": recipe.name, "seed": recipe.train.seed, "steps": training["steps"], "tokens": training["tokens"]}
    row |= {"seconds": training["training_seconds"], "device": training["device"], "date": training["date"]}
    row["optimizer"] = recipe.train.optimizer.model_dump()
    row |= {"versions": training["versions"], "val_bpb": training["val_bpb"]}
    row |= {"best_val_bpb": training["best_val_bpb"], "best_step": training["best_step"], "file": None}
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text())
        row["file"] = {key: record[key] for key in KEPT}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note")
    arguments = parser.parse_args()
    try:
        rows = [summarise_golf(folder) for folder in arguments.folders]
    except ValueError as error:
        parser.error(str(error))
    record = {"name": "golf runs", "rows": rows} | ({"note": arguments.note} if arguments.note else {})
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
