"""The section of docs/results.md on parts of a training step, from the record of benchmarks/record_steps.py."""

TRAINING_STEPS = "benchmarks/results/training-steps.json"


def training_section(tables: list[dict] | None) -> str:
    if not tables:
        return ""
    page = "\n# A training step\n\nBy benchmarks/train_step.py on random tokens: medians of forward and backward of a "
    page += "micro-batch, and of the optimizer. MFU counts the FLOPs that a token uses.\n"
    return page + "".join(_table(table) for table in tables)


def _table(table: dict) -> str:
    rows, first = table["rows"], table["rows"][0]
    made = first["environment"]
    page = f"\n## {table['title']}\n\n" + "".join(f"    {row['command']}\n" for row in rows)
    page += f"\n{made['date'][:10]}; {made['device_name']}, {made['dtype']}, torch {made['torch']}, triton "
    page += f"{made['triton']}, commit {made['git_commit'][:7]}.\n\n"
    head = ["", "parameters", "FLOPs/token", "micro-batch, ms", "optimizer, ms", "tokens/s", "beside", "MFU", "memory"]
    page += f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|\n"
    for row in rows:
        cells = [row["label"], f"{row['parameters'] / 1e6:,.0f} M", f"{row['training_flops_per_token'] / 1e9:.2f} G"]
        cells += [f"{1e3 * row['micro_batch_seconds']:.1f}", f"{1e3 * row['optimizer_seconds']:.1f}"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / first['tokens_per_second']:.2f}×"]
        cells.append("–" if row["mfu"] is None else f"{row['mfu']:.1%}")
        cells.append("–" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f} GiB")
        page += f"| {' | '.join(cells)} |\n"
    return page + (f"\n{table['note']}\n" if "note" in table else "")
