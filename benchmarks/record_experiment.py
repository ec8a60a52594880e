"""Record what an experiment found as one JSON file for benchmarks/results/experiments.

    python benchmarks/record_experiment.py RUNS/NAME benchmarks/results/experiments/NAME.json --command "fusedlm ..."

What `fusedlm compare` wrote to results.json, without the recipes, which the experiment's file and the command give.
"""

import argparse
import json
from pathlib import Path

DROPPED = ("recipe",)


def summarise(folder: Path, command: str, note: str | None) -> dict:
    """The record of one experiment's folder."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for variant in results["variants"].values():
        for key in DROPPED:
            del variant[key]
    record = {"name": results["experiment"]["name"], "command": command} | results
    return record | ({"note": note} if note else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--command", required=True, help="what was run, for the reader who wants to repeat it")
    parser.add_argument("--note", help="what the reader of the results page must know besides")
    arguments = parser.parse_args()
    record = summarise(arguments.folder, arguments.command, arguments.note)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
