"""The section of docs/results.md on decoding, from the record of benchmarks/decoding.py."""

from pathlib import Path

DECODING = "benchmarks/results/decoding.json"
PLOT = "decoding.png"
_COLOURS = ("#24292f", "#b03060", "#e07a5f", "#8f5fbf", "#2a9d8f", "#3a6ea5", "#d4a017")
_MARKERS = "osD^vPX"


def decoding_section(record: dict | None) -> str:
    """Tokens per second of every mixer, of models at batch 1, and of variants of a step; "" without a record."""
    if record is None:
        return ""
    made = record["environment"]
    page = f"\n# Decoding\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, {made['dtype']}, "
    page += (
        f"python {made['python']}, torch {made['torch']}, triton {made['triton']}, commit {made['git_commit'][:7]}. "
    )
    page += f"A copy moves {record['copy_bytes_per_second'] / 1e9:,.0f} GB/s. Random weights, states filled to the "
    page += (
        "context; a step is one token of each row and the draw of the next, in one CUDA graph. The floor is the time "
    )
    page += "of the weights and the state at the rate of the copy.\n"
    if record["table"]:
        page += "\nkepler-wiki with each mixer, tokens per second and the fraction of the floor:\n\n"
        page += _table(record["table"])
        page += f"\n![Tokens per second of every mixer by batch size](images/{PLOT})\n"
    if record["alone"]:
        page += "\nBatch 1:\n\n| recipe | context | ms per token | tokens/s | weights read, of the copy's rate |\n"
        page += "|---|---|---|---|---|\n"
        for row in record["alone"]:
            page += f"| {row['recipe']} | {row['context']:,} | {_figures(row)} |\n"
    if record["variants"]:
        page += "\nHow a step is run:\n\n| model | batch | context | step | ms per token | tokens/s | weights read, of "
        page += "the copy's rate |\n|---|---|---|---|---|---|---|\n"
        for row in record["variants"]:
            model = " ".join(name for name in (row["recipe"], row["mixer"]) if name)
            page += f"| {model} | {row['batch']} | {row['context']:,} | {row['variant']} | {_figures(row)} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def _columns(rows: list[dict]) -> list[tuple[int, int]]:
    return sorted({(row["context"], row["batch"]) for row in rows})


def _table(rows: list[dict]) -> str:
    columns = _columns(rows)
    page = f"| mixer | {' | '.join(f'{context:,} tokens, batch {batch}' for context, batch in columns)} |\n"
    page += "|---" * (1 + len(columns)) + "|\n"
    missing = {}
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        found = {(row["context"], row["batch"]): row for row in rows if row["mixer"] == mixer}
        cells = []
        for column in columns:
            row = found.get(column)
            if row is None or "reason" in row:
                cells.append("–")
                if row is not None:
                    missing[f"{mixer}, {column[0]:,} tokens, batch {column[1]}"] = row["reason"]
            else:
                mark = "" if row["graph"] else ", no graph"
                share = row["floor_milliseconds"] / row["milliseconds"]
                cells.append(f"{row['tokens_per_second']:,.0f} ({share:.0%}{mark})")
        page += f"| {mixer} | {' | '.join(cells)} |\n"
    if missing:
        page += f"\nNot measured: {'; '.join(f'{where}: {why}' for where, why in missing.items())}.\n"
    return page


def _figures(row: dict) -> str:
    if "reason" in row:
        return f"{row['reason']} | – | –"
    mark = "" if row["graph"] else ", no graph"
    return f"{row['milliseconds']:.3f} | {row['tokens_per_second']:,.0f} | {row['weight_rate']:.0%}{mark}"


def draw_decoding(record: dict, folder: Path) -> None:
    """A panel of each context: tokens per second by batch size, a line per mixer. The hardware is in the title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in record["table"] if "reason" not in row]
    contexts = sorted({row["context"] for row in rows})
    if not contexts:
        return
    figure, panels = pyplot.subplots(
        1, len(contexts), figsize=(10, 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    mixers = list(dict.fromkeys(row["mixer"] for row in record["table"]))
    for axes, context in zip(panels[0], contexts, strict=True):
        for i, mixer in enumerate(mixers):
            line = sorted(
                (r["batch"], r["tokens_per_second"]) for r in rows if (r["mixer"], r["context"]) == (mixer, context)
            )
            colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
            axes.plot(*zip(*line, strict=True) if line else ((), ()), color=colour, marker=marker, label=mixer)
        batches = sorted({row["batch"] for row in rows})
        axes.set(
            xscale="log", yscale="log", xlabel="sequences decoded together", title=f"{context:,} tokens of context"
        )
        axes.set_xticks(batches, batches)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("tokens per second")
    panels[0][-1].legend(fontsize=8, frameon=False)
    made = record["environment"]
    figure.suptitle(f"Decoding on {made['device_name']}, torch {made['torch']}, {made['date'][:10]}", fontsize=10)
    figure.savefig(folder / PLOT, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
