"""The plan of a recipe for a person: rounded, in 40 columns if need be."""

import textwrap
from pathlib import PurePath

from fusedlm.cli.gpus import GPUS
from fusedlm.terminal import make_console

_LONGEST_LABEL = 20
_WIDE = 72  # columns from which notes stand beside the figures


def print_plan(estimate: dict) -> None:
    """Print a plan of `fusedlm.cli.plan.make_plan`."""
    for line in plan_lines(estimate, make_console().width):
        print(line)


def plan_lines(estimate: dict, columns: int) -> list[str]:
    """The lines of the plan, at most `columns` long from 40 columns on: label, figure, and in wide terminals a note."""
    lines = [f"plan of {estimate['name']}"]
    sections = [_size(estimate), _text(estimate), _memory(estimate), _time(estimate), _states(estimate)]
    sections.append(_quantized(estimate))
    label_width = max(len(label) for _, rows in sections for label, _, _ in rows)
    for title, rows in sections:
        lines += ["", title]
        for label, figure, note in rows:
            line = f"  {label:<{label_width}}  {figure:>12}"
            lines.append(f"{line}  {note}".rstrip() if columns >= _WIDE else line)
    for sentence in _sentences(estimate):
        lines += ["", *textwrap.wrap(sentence, min(columns, 100), break_long_words=False, break_on_hyphens=False)]
    return lines


def _size(estimate: dict):
    from fusedlm.report.units import count

    sources = {"option": "--vocab-size", "recipe": "stated by the recipe", "tokenizer": ""}
    rows = [("parameters", count(estimate["parameters"]), "")]
    if estimate["active_parameters"] != estimate["parameters"]:
        rows.append(("  active per token", count(estimate["active_parameters"]), ""))
    rows.append(("  embedding", count(estimate["embedding_parameters"]), ""))
    if estimate["mtp_parameters"]:
        rows.append(("  multi-token", count(estimate["mtp_parameters"]), "model.mtp, in training alone"))
    rows += [
        ("vocabulary", f"{estimate['vocab_size']:,}", sources[estimate["vocab_source"]]),
        ("training tokens", count(estimate["tokens"]), "steps × batch × length"),
        ("FLOPs per token", flops(estimate["training_flops_per_token"]), "forward and backward"),
        ("training FLOPs", flops(estimate["training_flops"]), ""),
    ]
    return "size", rows


def _text(estimate: dict):
    from fusedlm.report.text import shortened
    from fusedlm.report.units import count, percent

    rows = []
    for source in estimate["text"]:
        where = source["path"] or f"source {source['type']}"
        label = source["name"] or PurePath(where).name
        note = f"{percent(source['tokens'] / estimate['tokens'])} of the tokens, " if source["name"] else ""
        rows.append((shortened(label, _LONGEST_LABEL), count(source["tokens"]), note + shortened(where, 40)))
    if estimate["packing"] != "stream":
        rows.append(("packing", estimate["packing"], "tokens include what fills up rows"))
    return "tokens read of each source" if estimate["text"][0]["name"] else "tokens read", rows


def _of_one(estimate: dict) -> str:
    return f"per GPU, {estimate['processes']} GPUs, {estimate['shards']} shards" if estimate["processes"] > 1 else ""


def _memory(estimate: dict):
    micro = f"{estimate['micro_batch_size']} × {estimate['seq_len']:,} tokens"
    others = {what: n for what, n in estimate["activation_bytes_by_recompute"].items() if what != estimate["recompute"]}
    rows = [
        ("weights", estimate["weight_bytes"], "float32"),
        ("gradients", estimate["gradient_bytes"], "float32"),
        ("optimizer", estimate["optimizer_bytes"], estimate["optimizer"]),
        ("average", estimate["average_bytes"], "train.ema, train.swa"),
        ("weight copies", estimate["weight_copy_bytes"], estimate["state_dtype"]),
        ("activations", estimate["activation_bytes"], f"estimate, {micro}"),
        *((f"  recompute: {what}", n, "runtime.recompute") for what, n in others.items()),
        ("total", estimate["memory_bytes"], _of_one(estimate)),
    ]
    return "memory to train on a GPU", [(label, _size_of(n), note) for label, n, note in rows if n]


def _time(estimate: dict):
    peak = f"{flops(estimate['device_flops'])}FLOP/s"
    known = estimate["device_flops"] == GPUS[estimate["gpu"]].bf16_flops
    device = f"on one {estimate['gpu']}" if known else f"at {peak}"
    rows = [
        (f"{device}, {estimate['mfu']:.0%}", _duration(estimate["seconds"]), f"utilisation of {peak}"),
        ("GPU hours", _rounded(estimate["gpu_hours"]), ""),
    ]
    if estimate["cost"] is not None:
        rows.append((f"cost at {estimate['price_per_hour']:g} per hour", _rounded(estimate["cost"]), ""))
    return "time", rows


def _states(estimate: dict):
    states = estimate["state_bytes"].items()
    return "decoding state of one sequence", [
        (f"{int(length):,} tokens", _size_of(n), estimate["state_dtype"]) for length, n in states
    ]


def _quantized(estimate: dict):
    note = "hidden matrices; the others float32"
    return "weights after fusedlm quantize", [(f, _size_of(n), note) for f, n in estimate["quantized_bytes"].items()]


def _sentences(estimate: dict) -> list[str]:
    outcomes: dict[tuple, list[str]] = {}
    for name, found in estimate["fits"].items():
        outcomes.setdefault((found["gpus"], found["micro_batch_size"]), []).append(name)
    sentences = [f"Stages: {'; then '.join(estimate['stages'])}."] if estimate["stages"] else []
    for (gpus, micro), names in outcomes.items():
        if gpus == 1 and micro == estimate["micro_batch_size"]:
            sentences.append(f"Fits on one: {', '.join(names)}.")
        elif gpus == 1:
            sentences.append(f"Fits on one with train.micro_batch_size={micro}: {', '.join(names)}.")
        elif gpus is not None:
            sentences.append(f"Needs weights sharded over {gpus} (runtime.parallel): {', '.join(names)}.")
        else:
            sentences.append(f"One sequence does not fit: {', '.join(names)}; shorten train.seq_len.")
    if estimate["vocab_source"] == "recipe":
        sentences.append("The tokenizer file does not exist; the vocabulary is of the size that the recipe states.")
    if estimate["state_dtype"] == "float32":
        sentences.append("The peak is that of bfloat16; float32 has a lower one and takes longer.")
    note = "Activations are estimated from shapes, for compiled training with fused kernels; peaks on a GPU differed "
    note += "by up to 11%."
    if not estimate["compile"]:
        note += " This recipe is not compiled (runtime.compile=false) and takes more, by a third or more."
    return [*sentences, note]


def _size_of(n_bytes: float) -> str:
    from fusedlm.report.units import size

    return size(n_bytes) if n_bytes < 1000 * 2**30 else f"{n_bytes / 2**40:,.3g} TiB"


def _duration(seconds: float) -> str:
    from fusedlm.report.units import duration

    days = seconds / 86400
    return duration(seconds) if days < 2 else f"{days:.1f} days" if days < 100 else f"{days:,.0f} days"


def _rounded(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def flops(value: float) -> str:
    """2.9e17 gives 290 P."""
    for power, letter in ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * power:
            return f"{value / power:.3g} {letter}" if value < 999.5 * power else f"{value / power:,.0f} {letter}"
    return f"{value:,.0f}"
