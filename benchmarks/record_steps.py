"""Record what benchmarks/train_step.py --json measured as one table of docs/results.md.

    python benchmarks/record_steps.py "TITLE" LABEL=FILE LABEL=FILE ... [--note TEXT] [--out FILE]

The first row is what the others are compared with. A table of the same title is replaced.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commands import without_json  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from scripts.training_section import TRAINING_STEPS  # noqa: E402

_KEPT = (
    "recipe", "overrides", "command", "environment", "parameters", "training_flops_per_token", "micro_batch_seconds",
    "optimizer_seconds", "tokens_per_second", "mfu", "peak_memory_gib",
)  # fmt: skip


def recorded(tables: list[dict], title: str, files: dict[str, Path], note: str | None) -> list[dict]:
    """The tables with this one, at its place or at the end.

    Raises:
        ValueError: a file is not what train_step.py writes.
    """
    rows = []
    for label, path in files.items():
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _KEPT if key not in result]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}: name a file that benchmarks/train_step.py --json wrote")
        result["command"] = without_json(result["command"])
        rows.append({"label": label} | {key: result[key] for key in _KEPT})
    table = {"title": title, "rows": rows} | ({"note": note} if note else {})
    if title not in [other["title"] for other in tables]:
        return [*tables, table]
    return [table if other["title"] == title else other for other in tables]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("title")
    parser.add_argument("rows", nargs="+", metavar="LABEL=FILE")
    parser.add_argument("--note")
    parser.add_argument("--out", type=Path, default=Path(TRAINING_STEPS))
    arguments = parser.parse_args()
    pairs = [row.rpartition("=") for row in arguments.rows]
    if not all(label and equals for label, equals, _ in pairs):
        parser.error(f"{next(row for row in arguments.rows if '=' not in row[1:])}: must be LABEL=FILE")
    tables = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else []
    try:
        tables = recorded(tables, arguments.title, {label: Path(file) for label, _, file in pairs}, arguments.note)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    write_atomic(arguments.out, json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
