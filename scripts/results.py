"""Write docs/results.md and the table of README.md from the records in benchmarks/results.

A record is what benchmarks/record_run.py makes of a finished run; its note says so where it was made otherwise.
"""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
# The rows of the README: recipe, what is measured, and how it is read from a record.
HEADLINES = [
    ("demo", "held-out bits per byte", lambda r: f"{r['val_bpb']:.3f}"),
    # A token is a byte there, and the text is ASCII: nats a token are nats a character.
    (
        "shakespeare",
        "lowest validation loss, nats a character (the recipe was chosen by it)",
        lambda r: f"{r['best_val_nll_per_token']:.4f}",
    ),
    ("gpt-350m", "model-FLOPs utilisation", lambda r: f"{r['mfu']:.1%}"),
    ("hybrid-350m", "model-FLOPs utilisation", lambda r: f"{r['mfu']:.1%}"),
]
COLUMNS = [
    "recipe",
    "device",
    "steps",
    "tokens",
    "training",
    "tokens/s",
    "MFU",
    "peak memory",
    "loader wait",
    "val bpb",
    "val nats/token",
]
HEADER = """# Results

Written by `python scripts/results.py` from the records in benchmarks/results, which `python benchmarks/record_run.py`
makes of finished runs, or whose note says how else they were made. Rates are medians over the steps after the first
tenth. Utilisation is counted as decisions.md says. Bits per byte are on the recipe's own held-out text, so they compare
where that text is the same.

"""


def read_records(folder: Path) -> list[dict]:
    """The records of training runs, by name."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted((r for r in records if isinstance(r, dict) and "val_bpb" in r), key=lambda r: r["name"])


def headline_table(records: list[dict]) -> str:
    """The README's table, one row a headline whether measured or not."""
    by_name = {record["name"]: record for record in records}
    lines = ["| recipe | measured | result | hardware |", "|---|---|---|---|"]
    for name, what, read in HEADLINES:
        record = by_name.get(name)
        result = f"{read(record)} | {record['device']}" if record else "not measured yet |"
        lines.append(f"| `recipes/{name}.yaml` | {what} | {result} |")
    return "\n".join(lines) + "\n"


def results_page(records: list[dict]) -> str:
    """All of docs/results.md."""
    if not records:
        return HEADER + "Nothing has been recorded yet.\n"
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for r in records:
        cells = [
            r["name"],
            r["device"],
            f"{r['steps']:,}",
            f"{r['tokens'] / 1e6:.1f} M",
            f"{r['training_seconds']:,.0f} s",
            f"{r['tokens_per_second']:,.0f}",
            "unknown peak" if r["mfu"] is None else f"{r['mfu']:.1%}",
            f"{r['peak_memory_gib']:.1f} GiB",
            f"{r['loader_wait_share']:.2%}",
            f"{r['val_bpb']:.4f}",
            f"{r['validation'][-1][2]:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    page = HEADER + "\n".join(lines) + "\n"
    for r in records:
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items() if version)
        page += f"\n## {r['name']}\n\n{r['description']}\n\n    {r['command']}\n\n{r['date']}; {versions}."
        page += f" Best validation at step {r['best_step']:,}: {r['best_val_bpb']:.4f} bits per byte,"
        page += f" {r['best_val_nll_per_token']:.4f} nats a token.\n"
        if "note" in r:
            page += f"\n{r['note']}\n"
    return page


def replace_table(readme: str, table: str) -> str:
    """The README with its results table replaced.

    Raises:
        ValueError: the marks around the table are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no results table between {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table + END + after


def main() -> int:
    records = read_records(REPOSITORY / "benchmarks/results")
    readme = REPOSITORY / "README.md"
    readme.write_text(replace_table(readme.read_text(encoding="utf-8"), headline_table(records)), encoding="utf-8")
    (REPOSITORY / "docs/results.md").write_text(results_page(records), encoding="utf-8")
    print(f"docs/results.md: {len(records)} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
