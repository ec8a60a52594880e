"""The section of docs/results.md on several GPUs, from the records of benchmarks/many_gpus.py."""

_NAMES = ("gpt-350m", "fusion-1b", "gpt-350m-four", "fusion-1b-four")
MANY_GPUS = tuple(f"benchmarks/results/many-gpus-{name}.json" for name in _NAMES)

FUSION_7B = "benchmarks/results/fusion-7b.json"


def compared(rows: list[dict]) -> list[dict]:
    """Each row with what it has of the first one's rate, the fractions of a step that its optimizer takes and would
    take as long as in the first, and the largest relative difference of its losses."""
    first = rows[0]
    found = []
    for row in rows:
        others = row["step_seconds"] - row["optimizer_seconds"]
        differences = [abs(a - b) / abs(b) for a, b in zip(row["losses"], first["losses"], strict=True)]
        more = {
            "scaling": row["tokens_per_second_per_gpu"] / first["tokens_per_second_per_gpu"],
            "optimizer": row["optimizer_seconds"] / row["step_seconds"],
            "replicated": first["optimizer_seconds"] / (others + first["optimizer_seconds"]),
            "loss_difference": max(differences, default=0.0),
        }
        found.append(row | more)
    return found


def many_gpus_section(records: list[dict]) -> str:
    if not records:
        return ""
    page = "\n# Several GPUs\n\nBy benchmarks/many_gpus.py, on GPUs of one host in one call: every GPU has the recipe's"
    page += " batch. Planned: the memory that `fusedlm plan` gives. Replicated: the optimizer's part of a step if every"
    page += " GPU updated all matrices. Losses: the largest relative difference from the first row's, of the recipe's "
    page += "batch divided over the GPUs.\n"
    return page + "".join(map(_table, records))


def _table(record: dict) -> str:
    made = record["environment"]
    page = f"\n## {record['name']}\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, "
    page += f"{made['dtype']}, torch {made['torch']}, commit {made['git_commit'][:7]}.\n\n"
    head = ["GPUs", "layout", "tokens/s per GPU", "of the first", "MFU", "step, ms", "optimizer", "replicated"]
    head += ["memory", "planned", "losses"]
    page += f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|\n"
    for row in compared(record["rows"]):
        layout = ", ".join(f"{key} {n}" for key, n in row["parallel"].items() if n != {"zero": 3}.get(key, 1))
        cells = [str(row["processes"]), layout or "–", f"{row['tokens_per_second_per_gpu']:,.0f}"]
        cells += [f"{row['scaling']:.1%}", "–" if row["mfu"] is None else f"{row['mfu']:.1%}"]
        cells += [f"{1e3 * row['step_seconds']:,.0f}", f"{row['optimizer']:.1%}", f"{row['replicated']:.1%}"]
        cells += [f"{row[key] / 2**30:.1f} GiB" for key in ("peak_memory_bytes", "planned_memory_bytes")]
        cells.append(f"{row['loss_difference']:.1e}")
        page += f"| {' | '.join(cells)} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def large_model_section(record: dict | None) -> str:
    """A model that no single GPU can train."""
    if record is None:
        return ""
    made, steps = record["environment"], record["steps"]
    speed = sorted(step["tokens_per_second"] for step in steps)[len(steps) // 2]
    page = f"\n## {record['name']} on {record['processes']} GPUs\n\n    {record['command']}\n\n{made['date'][:10]}; "
    page += f"{made['device_name']}, {made['dtype']}, torch {made['torch']}, commit {made['git_commit'][:7]}. "
    page += f"{record['parameters'] / 1e9:.1f} billion parameters, {record['tokens_per_step']:,} tokens per step, "
    page += f"{speed:,} tokens/s in total (median), {record['device_memory_bytes'] / 2**30:.1f} GiB of memory on each "
    page += "GPU, the CUDA context and NCCL's buffers included. Stopped at the time limit.\n\n"
    page += "| step | loss | tokens/s |\n|---|---|---|\n"
    return page + "".join(f"| {s['step']} | {s['loss']:.3f} | {s['tokens_per_second']:,} |\n" for s in steps)
