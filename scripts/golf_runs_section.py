"""The section of docs/results.md on whole runs of `fusedlm golf`, from the record of benchmarks/record_golf.py."""

import statistics

GOLF_RUNS = "benchmarks/results/golf-runs.json"


def golf_runs_section(record: dict | None) -> str:
    """Each training and the file that it became; and what the seeds of a recipe have in common."""
    if record is None:
        return ""
    first = record["rows"][0]
    page = f"\n# Whole golf runs\n\n{first['date']}; {first['device']}, torch {first['versions']['torch']}, commit "
    page += f"{first['versions']['git_commit'][:7]}. Bits per byte of held-out text. At the end: of the validation of "
    page += "training, its first tokens; lowest: of all of its validations. The others are of all held-out text: "
    page += "before packing, and of the file with windows that do not overlap and with sliding ones.\n\n"
    columns = ["recipe", "optimizer", "seed", "steps", "seconds", "lowest", "at the end", "before", "packed", "sliding"]
    page += f"| {' | '.join([*columns, 'bytes', 'with code'])} |\n" + "|---" * (len(columns) + 2) + "|\n"
    for row in record["rows"]:
        cells = [row["recipe"], f"`{row['optimizer']['type']}`", f"{row['seed']}", f"{row['steps']:,}"]
        cells += [f"{row['seconds']:,.0f}", f"{row['best_val_bpb']:.4f}", f"{row['val_bpb']:.4f}"]
        cells += _file(row["file"])
        page += f"| {' | '.join(cells)} |\n"
    page += _seeds(record["rows"])
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def _file(file: dict | None) -> list[str]:
    if file is None:
        return ["–"] * 5
    scores = [f"{file[name]['bpb']:.4f}" for name in ("float", "plain", "sliding")]
    return [*scores, f"{file['bytes']:,}", f"{file['bytes'] + file['code_bytes']:,}"]


def _seeds(rows: list[dict]) -> str:
    """Mean and sample standard deviation of the files of each recipe with several."""
    page = ""
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        files = [row["file"] for row in rows if row["recipe"] == recipe and row["file"] is not None]
        if len(files) > 1:
            packed = [file["sliding"]["bpb"] for file in files]
            lost = [file["plain"]["bpb"] - file["float"]["bpb"] for file in files]
            page += f"\n{recipe}, {len(files)} seeds: {statistics.mean(packed):.4f} ± {statistics.stdev(packed):.4f} "
            page += f"bits per byte with a stride of {files[0]['sliding']['stride']}; packing loses "
            page += f"{statistics.mean(lost):.4f}.\n"
    return page
