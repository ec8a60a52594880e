"""Record the results of an experiment as one JSON file for benchmarks/results/experiments.

    python benchmarks/record_experiment.py RUNS/NAME benchmarks/results/experiments/NAME.json --command "fusedlm ..."

The record is results.json as `fusedlm compare` wrote it, without the recipes: the experiment's file and the command
give them.
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
    parser.add_argument("--command", required=True, help="the command that made the experiment")
    parser.add_argument("--note", help="a remark for the results page")
    arguments = parser.parse_args()
    record = summarise(arguments.folder, arguments.command, arguments.note)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
