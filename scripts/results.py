"""Write docs/results.md and the table of README.md from the records in benchmarks/results.

benchmarks/record_run.py makes a record of a finished run, benchmarks/record_experiment.py of an experiment. A record
that was made differently has a note.
"""

import json
import statistics
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from scripts.decoding_section import DECODING, decoding_section, draw_decoding  # noqa: E402
from scripts.golf_runs_section import GOLF_RUNS, golf_runs_section  # noqa: E402
from scripts.golf_section import CORRECTIONS, GOLF, golf_section  # noqa: E402
from scripts.lengths_section import LENGTHS, draw_lengths, lengths_section, read_lengths  # noqa: E402
from scripts.low_precision_section import (  # noqa: E402
    OUTLIERS,
    OUTLIERS_COST,
    QUANTISED_LINEAR,
    low_precision_section,
    outliers_section,
)
from scripts.many_gpus_section import FUSION_7B, MANY_GPUS, large_model_section, many_gpus_section  # noqa: E402
from scripts.nanogpt_section import NANOGPT, nanogpt_section  # noqa: E402
from scripts.ops_section import IMAGES, OPS, STEPS, draw_ops, ops_section  # noqa: E402
from scripts.optimizer_section import OPTIMIZER_STEP, optimizer_section  # noqa: E402
from scripts.quantized_decoding_section import QUANTIZED_DECODING, quantized_decoding_section  # noqa: E402
from scripts.serving_section import SERVING, VLLM, serving_section, vllm_section  # noqa: E402
from scripts.speculation_section import SPECULATION, speculation_section  # noqa: E402
from scripts.switches_section import switches_section  # noqa: E402
from scripts.training_section import TRAINING_STEPS, training_section  # noqa: E402

RUNS, EXPERIMENTS = "benchmarks/results", "benchmarks/results/experiments"
EXTENSION = "benchmarks/results/probes/extend.json"  # as `fusedlm eval RUN --probe extend` wrote it
RECALL = "benchmarks/results/recall.json"  # as benchmarks/recall.py wrote it, plots beside it
OTHERS = (
    EXTENSION, RECALL, DECODING, *OPS, STEPS, OPTIMIZER_STEP, NANOGPT, GOLF, GOLF_RUNS, CORRECTIONS, TRAINING_STEPS,
    SPECULATION, QUANTISED_LINEAR, OUTLIERS, OUTLIERS_COST, *MANY_GPUS, FUSION_7B, QUANTIZED_DECODING, *SERVING, VLLM,
)  # fmt: skip
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
# Rows of the README's table: recipe, measurement, and a function that reads it from a record.
HEADLINES = [
    ("demo", "held-out bits per byte", lambda r: f"{r['val_bpb']:.3f}"),
    # Tokens are bytes and the text is ASCII: nats per token are nats per character.
    (
        "shakespeare",
        "validation loss, nats per character, mean of three seeds",
        lambda r: f"{nll_of_seeds(r):.4f}",
    ),
    ("ten-minutes", "held-out bits per byte, mean of three seeds", lambda r: f"{bits_of_evaluations(r):.3f}"),
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
# Columns of an experiment: title, key of a variant's summary over seeds, and format.
MEASURES = [
    ("train loss, last 10 steps", "train_loss_last_10", lambda x: f"{x:.4f}"),
    ("validation loss", "val_loss", lambda x: f"{x:.4f}"),
    ("lowest during training", "best_val_loss", lambda x: f"{x:.4f}"),
    ("bits per byte", "val_bpb", lambda x: f"{x:.4f}"),
    ("FFN FLOPs", "ffn_flops_share", lambda x: f"{x:.1%}"),
    ("tokens/s", "tokens_per_second", lambda x: f"{x:,.0f}"),
    ("peak memory", "peak_memory_bytes", lambda x: f"{x / 2**30:.2f} GiB"),
]
HEADER = """# Results

Written by `python scripts/results.py` from the records in benchmarks/results.

"""
ABOUT_RUNS = """# Runs

`python benchmarks/record_run.py` makes records of finished runs; a record that was made differently has a note. Rates
are medians over the steps after the first tenth. decisions.md defines utilisation. Bits per byte are on the validation
text of the recipe, and are comparable only between recipes with the same text.

"""


def read_records(folder: Path) -> list[dict]:
    """Records of training runs, sorted by name."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted((r for r in records if isinstance(r, dict) and "val_bpb" in r), key=lambda r: r["name"])


def nll_of_seeds(record: dict) -> float:
    """Nats per token at the end of training, mean over seeds."""
    if "seeds" not in record:  # older records are of one run
        return record["validation"][-1][2]
    return statistics.mean(seed["val_nll_per_token"] for seed in record["seeds"])


def bits_of_evaluations(record: dict) -> float:
    """Bits per byte of `fusedlm eval`, mean over seeds."""
    return statistics.mean(seed["eval"]["bpb"] for seed in record["seeds"])


def headline_table(records: list[dict]) -> str:
    """The README's table, one row per headline, measured or not."""
    by_name = {record["name"]: record for record in records}
    lines = ["| recipe | measured | result | hardware |", "|---|---|---|---|"]
    for name, what, read in HEADLINES:
        record = by_name.get(name)
        result = f"{read(record)} | {record['device']}" if record else "not measured yet |"
        lines.append(f"| `recipes/{name}.yaml` | {what} | {result} |")
    return "\n".join(lines) + "\n"


def results_page(
    records: list[dict], experiments: list[dict], others: dict[str, dict | None], lengths: list[dict]
) -> str:
    """docs/results.md; `others` are the records of OTHERS, `lengths` those of LENGTHS."""
    page = HEADER + lengths_section(lengths)
    page += ABOUT_RUNS + (runs_section(records) if records else "No run is recorded yet.\n")
    page += experiments_section(experiments) + nanogpt_section(others[NANOGPT], records, experiments)
    page += golf_section(others[GOLF], others[CORRECTIONS]) + golf_runs_section(others[GOLF_RUNS])
    page += recall_section(others[RECALL]) + extension_section(others[EXTENSION])
    page += training_section(others[TRAINING_STEPS]) + low_precision_section(others[QUANTISED_LINEAR])
    page += outliers_section(others[OUTLIERS], others[OUTLIERS_COST])
    page += many_gpus_section([others[path] for path in MANY_GPUS if others[path] is not None])
    page += large_model_section(others[FUSION_7B])
    page += decoding_section(others[DECODING]) + speculation_section(others[SPECULATION])
    page += quantized_decoding_section(others[QUANTIZED_DECODING])
    page += serving_section([others[path] for path in SERVING if others[path] is not None])
    page += vllm_section(others[VLLM])
    page += ops_section(ops_records(others), others[STEPS])
    return page + optimizer_section(others[OPTIMIZER_STEP])


def ops_records(others: dict[str, dict | None]) -> list[dict]:
    return [others[path] for path in OPS if others[path] is not None]


def runs_section(records: list[dict]) -> str:
    """A table of all runs, and a section for each."""
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
            f"{nll_of_seeds(r):.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    page = "\n".join(lines) + "\n"
    for r in records:
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items() if version)
        page += f"\n## {r['name']}\n\n{r['description']}\n\n    {r['command']}\n\n{r['date']}; {versions}."
        page += f" Best validation at step {r['best_step']:,}: {r['best_val_bpb']:.4f} bits per byte,"
        page += f" {r['best_val_nll_per_token']:.4f} nats per token"
        page += f" (window {r['val_window']}, stride {r['val_stride']}).\n" if r.get("val_window") else ".\n"
        page += _seeds(r.get("seeds", []))
        if "note" in r:
            page += f"\n{r['note']}\n"
    return page


def _seeds(seeds: list[dict]) -> str:
    """One row per seed where there are several, and their mean."""
    if len(seeds) < 2:
        return ""
    columns = {
        "bits per byte": [seed["val_bpb"] for seed in seeds],
        "nats per token": [seed["val_nll_per_token"] for seed in seeds],
    }
    if all("eval" in seed for seed in seeds):
        overlap = "window {window}, stride {stride}".format(**seeds[0]["eval"])
        columns[f"bits per byte by `fusedlm eval` ({overlap})"] = [seed["eval"]["bpb"] for seed in seeds]
    page = f"\n| seed | {' | '.join(columns)} | seconds of training |\n|{'---|' * (len(columns) + 2)}\n"
    for i, seed in enumerate(seeds):
        cells = [f"{values[i]:.4f}" for values in columns.values()]
        page += f"| {seed['seed']} | {' | '.join(cells)} | {seed['training_seconds']:,.0f} |\n"
    means = [f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" for values in columns.values()]
    return page + f"| mean ± sample standard deviation | {' | '.join(means)} | |\n"


def read_experiments(folder: Path) -> list[dict]:
    """Records of experiments, sorted by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def experiments_section(records: list[dict]) -> str:
    if not records:
        return ""
    page = "\n# Experiments\n\nBy `fusedlm compare`: mean ± sample standard deviation over seeds; compare.md "
    page += "explains verdicts. Losses are in nats per token.\n"
    return page + "".join(_experiment(record) for record in records) + switches_section(records)


def _experiment(record: dict) -> str:
    experiment, variants = record["experiment"], record["variants"]
    page = f"\n## {record['name']}\n\n{experiment['description']}\n\n    {record['command']}\n\n{_made(record)}\n\n"
    measures = [m for m in MEASURES if any(variant[m[1]]["n"] for variant in variants.values())]
    lengths = list(next(iter(variants.values()))["decoding"])
    head = ["variant", "parameters", "FLOPs/token", *(name for name, _, _ in measures)]
    head += [f"state at {int(length):,}" for length in lengths] + [f"decode/s at {int(length):,}" for length in lengths]
    rows = [head, ["---"] * len(head)]
    for name, variant in variants.items():
        cells = [name, f"{variant['parameters'] / 1e6:.2f} M", f"{variant['flops_per_token'] / 1e6:,.1f} M"]
        cells += [_spread(variant[key], write) for _, key, write in measures]
        found = [variant["decoding"].get(length) for length in lengths]
        cells += ["–" if d is None else f"{d['state_bytes'] / 2**20:.2f} MiB" for d in found]
        cells += ["–" if d is None else f"{d['tokens_per_second']:,.0f}" for d in found]
        rows.append(cells)
    page += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    changes = [
        f"{name}: {change['key']} {change['before']} → {change['after']}"
        for name, variant in variants.items()
        for change in variant["changed_to_match"]
    ]
    if changes:
        page += f"\nChanged to match {experiment['match']}: {'; '.join(changes)}.\n"
    page += "".join(f"\n- {sentence}" for sentence in record["verdicts"]) + "\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def _made(record: dict) -> str:
    done = sum(run["outcome"] == "finished" for run in record["runs"])
    seeds = ", ".join(map(str, record["experiment"]["seeds"]))
    steps = sorted({variant["steps"] for variant in record["variants"].values()})
    where = "; ".join(
        f"{e['device_name']}, {e['dtype']}, python {e['python']}, torch {e['torch']}, commit {e['git_commit'][:7]}"
        for e in record["environments"]
    )
    return (
        f"{', '.join(record['dates'])}; {done} of {len(record['runs'])} runs, seeds {seeds}; "
        f"{' to '.join(f'{n:,}' for n in steps)} steps; match: {record['experiment']['match']}; {where}."
    )


def _spread(summary: dict, write) -> str:
    if not summary["n"]:
        return "–"
    mean = write(summary["mean"])
    exact = summary["std"] is None or write(summary["std"]) == write(0.0)
    return mean if exact else f"{mean} ± {write(summary['std'])}"


def recall_section(record: dict | None) -> str:
    """Associative recall and retrieval of a sentence, one row per model."""
    if record is None:
        return ""
    versions, settings = record["versions"], record["settings"]
    page = f"\n# Recall\n\n    {record['command']}\n\n{record['date']}; {record['device']}, {record['dtype']}, "
    page += f"torch {versions['torch']}, commit {versions['git_commit'][:7]}. Models of {settings['layers']} layers of "
    page += f"width {settings['dim']}, about equal in parameters by the width of their feed-forward, trained from "
    page += "scratch on each probe; [probes.md](probes.md) has the details.\n"
    for probe, title in (("mqar", "Multi-query associative recall"), ("needle", "Needle")):
        entries = [entry for entry in record["entries"] if entry["probe"] == probe]
        if entries:
            steps, lr = settings[f"{probe}_steps"], settings[f"{probe}_lr"]
            page += f"\n## {title}\n\n{steps:,} steps at a learning rate of {lr:g}. "
            page += _recalled(entries) if probe == "mqar" else _found(entries, settings["needle"]["trained_length"])
            page += f"\n![{title} by model](../benchmarks/results/recall-{probe}.png)\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def _recalled(entries: list[dict]) -> str:
    points = entries[0]["result"]["accuracy"]
    page = "Fraction of queries whose most likely token is the right value, by pairs per sequence.\n\n"
    fractions = [[point["accuracy"] for point in entry["result"]["accuracy"]] for entry in entries]
    page += _fractions(entries, [f"{point['pairs']} pairs" for point in points], fractions)
    guesses = " | ".join(f"{point['guess']:.1%}" for point in points)
    return page + f"| guessing among the values | | | {guesses} |\n"


def _found(entries: list[dict], trained_length: int) -> str:
    cells = entries[0]["result"]["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    page = f"Fraction of needles found, mean over {len(cells) // len(lengths)} depths, by tokens of context; the "
    page += f"training length is {trained_length}.\n\n"
    by_length = [
        [[cell["accuracy"] for cell in entry["result"]["cells"] if cell["length"] == n] for n in lengths]
        for entry in entries
    ]
    fractions = [[sum(values) / len(values) for values in row] for row in by_length]
    return page + _fractions(entries, [f"{n:,} tokens" for n in lengths], fractions)


def _fractions(entries: list[dict], columns: list[str], fractions: list[list[float]]) -> str:
    """One row per model and seed."""
    page = f"| model | seed | parameters | {' | '.join(columns)} |\n" + "|---" * (3 + len(columns)) + "|\n"
    for entry, row in zip(entries, fractions, strict=True):
        cells = " | ".join(f"{fraction:.1%}" for fraction in row)
        page += f"| {entry['model']} | {entry['seed']} | {entry['result']['parameters']:,} | {cells} |\n"
    return page


def extension_section(record: dict | None) -> str:
    """Bits per byte at 1× and 4× the training length with each factor of YaRN; the plot is the probe's own."""
    if record is None:
        return ""
    made, length = record["environment"], record["trained_length"]
    multiple = record["max_multiple"] if "max_multiple" in record else record["reach"]  # the key of older records
    page = "\n# Context extension\n\n"
    page += f"    fusedlm eval {record['run']} --probe extend --samples {record['windows']}\n\n"
    page += f"{made['date'][:10]}; {made['device_name']}, {made['dtype']}, torch {made['torch']}, "
    page += f"commit {made['git_commit'][:7]}; trained on {length} tokens, {record['windows']} windows of {multiple} "
    page += "times that length. Bits per byte of the last quarter of a training length within one and within four "
    page += "training lengths, on the same text, and their difference from the unstretched model; "
    page += "[probes.md](probes.md) has the details.\n\n"
    page += "| YaRN | at 1× | at 4× | 1× against unstretched | 4× against unstretched |\n|---|---|---|---|---|\n"
    unstretched = record["curves"][0]
    for curve in record["curves"]:
        cells = ["unstretched" if curve["yarn"] is None else f"factor {curve['yarn']:g}"]
        cells += [_bits(curve["at_1x"]), _bits(curve["at_4x"])]
        cells += ["–", "–"] if curve is unstretched else [_change(curve, unstretched, n) for n in ("1x", "4x")]
        page += f"| {' | '.join(cells)} |\n"
    return page + "\n![Bits per byte by position, without and with YaRN](images/extend.png)\n"


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _change(curve: dict, unstretched: dict, place: str) -> str:
    """What YaRN adds at 1x or 4x, with its standard error where the record has it; older ones do not."""
    if curve[f"at_{place}"] is None:
        return "–"
    change, error = curve[f"at_{place}"] - unstretched[f"at_{place}"], curve.get(f"change_{place}_error")
    return f"{change:+.4f}" if error is None else f"{change:+.4f} ± {error:.4f}"


def read_others(repository: Path) -> dict[str, dict | None]:
    """The records of OTHERS; None: not there."""
    paths = {name: repository / name for name in OTHERS}
    return {n: json.loads(p.read_text(encoding="utf-8")) if p.exists() else None for n, p in paths.items()}


def replace_table(readme: str, table: str) -> str:
    """The README with its results table replaced.

    Raises:
        ValueError: the markers around the table are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no results table between {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table + END + after


def main() -> int:
    records = read_records(REPOSITORY / RUNS)
    readme = REPOSITORY / "README.md"
    readme.write_text(replace_table(readme.read_text(encoding="utf-8"), headline_table(records)), encoding="utf-8")
    experiments = read_experiments(REPOSITORY / EXPERIMENTS)
    others = read_others(REPOSITORY)
    for record in ops_records(others):
        draw_ops(record, REPOSITORY / IMAGES)
    if others[DECODING] is not None:
        draw_decoding(others[DECODING], REPOSITORY / IMAGES)
    lengths = read_lengths(REPOSITORY / LENGTHS)
    draw_lengths(lengths, REPOSITORY / IMAGES)
    page = results_page(records, experiments, others, lengths)
    (REPOSITORY / "docs/results.md").write_text(page, encoding="utf-8")
    print(f"docs/results.md: {len(records)} runs, {len(experiments)} experiments")
    return 0


if __name__ == "__main__":
    sys.exit(main())
