"""The section of docs/results.md on training throughput by sequence length, from records of benchmarks/lengths.py."""

import json
from pathlib import Path

LENGTHS = "benchmarks/results/lengths"
PLOT = "lengths.png"
_PLOTTED = "350m"  # in the names of the recipes whose rows are drawn, models of one size
# Softmax warm, linear time cold, the hybrid dark.
_STYLES = {
    "attention": ("#b03060", "o"),
    "mla": ("#e07a5f", "s"),
    "diff_mla": ("#d4a017", "D"),
    "cmd_mla": ("#8f5fbf", "^"),
    "gdn": ("#2a9d8f", "v"),
    "mamba2": ("#3a6ea5", "P"),
    "sdla": ("#5fa8d3", "X"),
}
_OWN = ("#24292f", "*")  # of a recipe as it is


def read_lengths(folder: Path) -> list[dict]:
    """Records, sorted by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def lengths_section(records: list[dict]) -> str:
    """The plot, and a table per base recipe; "" without records."""
    if not records:
        return ""
    page = (
        "# Training throughput by sequence length\n\nTokens per second of whole training steps (forward, backward and "
    )
    page += "optimizer) on random tokens, each sequence one document; blocks of one recipe with each mixer in turn. A "
    page += "micro-batch has 32,768 tokens if not said otherwise, or one sequence. Rates marked * recompute the mixers "
    page += "in the backward pass, without which they do not fit.\n"
    if any(_PLOTTED in record["name"] for record in records):
        page += f"\n![Training throughput against sequence length, models of 350 million parameters](images/{PLOT})\n"
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(_PLOTTED if _PLOTTED in record["name"] else record["name"], []).append(record)
    for group in groups.values():
        names = " and ".join(dict.fromkeys(record["name"] for record in group))
        page += f"\n{names}, tokens per second by tokens per sequence:\n\n" + _table(group)
        for record in group:
            made = record["environment"]
            page += f"\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, {made['dtype']}, torch "
            page += f"{made['torch']}, triton {made['triton']}, commit {made['git_commit'][:7]}.\n"
        page += "".join(f"\n{note}\n" for note in dict.fromkeys(r["note"] for r in group if "note" in r))
    return page + "\n"


def _label(record: dict, row: dict) -> str:
    return record["name"] if row["mixer"] == "recipe" else row["mixer"]


def _rows(records: list[dict]) -> dict[str, dict[int, dict]]:
    """Of each label, rows by length; of two rows the one of the later record."""
    found: dict[str, dict[int, dict]] = {}
    for record in sorted(records, key=lambda r: r["environment"]["date"]):
        for row in record["rows"]:
            found.setdefault(_label(record, row), {})[row["length"]] = row
    order = [*_STYLES, *sorted(label for label in found if label not in _STYLES)]
    return {label: found[label] for label in order if label in found}


def _table(records: list[dict]) -> str:
    rows = _rows(records)
    lengths = sorted({length for of_label in rows.values() for length in of_label})
    page = f"| mixer | parameters | {' | '.join(f'{length:,}' for length in lengths)} |\n"
    page += "|---" * (2 + len(lengths)) + "|\n"
    for label, of_label in rows.items():
        cells = []
        for length in lengths:
            row = of_label.get(length)
            if row is None or "reason" in row:
                cells.append("–" if row is None else row["reason"])
            else:
                cells.append(f"{row['tokens_per_second']:,.0f}{'*' if row['recompute'] != 'none' else ''}")
        parameters = next((r["parameters"] for r in of_label.values() if "parameters" in r), None)
        size = "–" if parameters is None else f"{parameters / 1e6:,.0f} M"
        page += f"| {label} | {size} | {' | '.join(cells)} |\n"
    return page


def draw_lengths(records: list[dict], folder: Path) -> None:
    """Tokens per second by sequence length, a line per mixer, both logarithmic; open markers recompute the mixers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [record for record in records if _PLOTTED in record["name"]]
    if not drawn:
        return
    figure, axes = pyplot.subplots(figsize=(8.5, 4.6), layout="constrained")
    ticks = set()
    for label, of_label in _rows(drawn).items():
        line = sorted((n, r) for n, r in of_label.items() if "reason" not in r)
        colour, marker = _STYLES.get(label, _OWN)
        lengths, rates = [n for n, _ in line], [r["tokens_per_second"] for _, r in line]
        axes.plot(lengths, rates, color=colour, label=label, lw=2)
        for n, r in line:
            face = colour if r["recompute"] == "none" else "white"
            axes.plot(n, r["tokens_per_second"], marker, color=colour, markerfacecolor=face, ms=7)
        ticks |= set(lengths)
    rates = (10_000, 20_000, 50_000, 100_000, 200_000)
    axes.set(xscale="log", yscale="log", xlabel="tokens per sequence", ylabel="training tokens per second")
    axes.set_xticks(sorted(ticks), [f"{n // 1024}k" for n in sorted(ticks)])
    axes.set_yticks(rates, [f"{rate // 1000}k" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    made = max((record["environment"] for record in drawn), key=lambda environment: environment["date"])
    title = "Models of 350 M parameters, whole training steps; open markers recompute the mixers"
    axes.set_title(f"{title}\n{made['device_name']}, torch {made['torch']}, {made['date'][:10]}", fontsize=10)
    figure.savefig(folder / PLOT, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
