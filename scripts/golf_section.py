"""The section of docs/results.md on golf-27m in 16,000,000 bytes, from the records of benchmarks/quantization.py and
benchmarks/corrections.py."""

import re

GOLF = "benchmarks/results/quantization/golf-27m.json"
CORRECTIONS = "benchmarks/results/corrections-golf-27m.json"
TITLE = "Golf in 16,000,000 bytes"
_LIMIT = 16_000_000
_INTEGERS = re.compile(r"int(\d) (.+)")


def golf_section(record: dict | None, corrections: dict | None) -> str:
    """Loss and bytes of each way to quantise; what the bytes of the file are; what could not win."""
    if record is None:
        return ""
    made, settings, results = record["environment"], record["settings"], record["results"]
    base = results["float"]["bpb"]
    page = f"\n# {TITLE}\n\n    python benchmarks/quantization.py RUN {_options(record)} --packed --out {GOLF}\n\n"
    page += f"{made['date'][:10]}; {made['device_name']}, python {made['python']}, torch {made['torch']}, "
    page += f"{made['dtype']}. The run is golf-27m after ten minutes of one H100, {base:.4f} bits per byte here in "
    page += f"float32. Scored: {settings['documents']} whole documents of {settings['text']}, "
    page += f"{settings['scored_bytes']:,} bytes, in windows that do not overlap, each document alone; calibrated with "
    page += f"{settings['tokens']:,} tokens of training text. "
    if "inputs" in settings:
        page += f"Inputs of matrices are those {settings['inputs']}. "
    page += "Where matrices have one width, embeddings and head are in int8. "
    page += "[golf.md](golf.md) and [quantization.md](quantization.md) have the methods.\n\n"
    page += "| method | bits per byte | lost | codes without gaps, MB | artifact, bytes | bits per weight |\n"
    page += "|---|---|---|---|---|---|\n"
    for key, result in sorted(results.items(), key=_order):
        if key == "float":
            continue
        file, bits = result.get("file_bytes"), result.get("bits_per_weight")
        cells = [_named(key), f"{result['bpb']:.4f}", f"{result['bpb'] - base:+.4f}"]
        cells.append("" if key.startswith("coded") else f"{result['tensor_bytes'] / 1e6:.2f}")
        cells += ["" if file is None else f"{file:,}", "" if bits is None else f"{bits:.3f}"]
        page += f"| {' | '.join(cells)} |\n"
    page += "".join(_bytes(key, result) for key, result in results.items() if "brotli_bytes" in result)
    return page + _corrections(corrections)


def _options(record: dict) -> str:
    """What the record was measured with."""
    settings = record["settings"]
    given = {key: settings.get(key) for key in ("text", "calibration", "tokens")}
    given["inputs"] = "FILE" if "inputs" in settings else None
    given["dtype"] = record["environment"]["dtype"]
    given["coded"] = " ".join(key.split()[1] for key in record["results"] if key.startswith("coded")) or None
    return " ".join(f"--{key} {value}" for key, value in given.items() if value is not None)


def _order(item: tuple[str, dict]) -> tuple:
    match = _INTEGERS.fullmatch(item[0])
    if match:
        return 1, -int(match[1])
    return 2 if item[0].startswith("coded") else 0, -int(item[0].split()[1]) if item[0].startswith("coded") else 0


def _named(key: str) -> str:
    match = _INTEGERS.fullmatch(key)
    if match:
        return f"int{match[1]}, {match[2]}"
    return f"coded, {int(key.split()[1]):,} bytes" if key.startswith("coded") else key


def _bytes(key: str, result: dict) -> str:
    """What the file consists of, and the same codes with other coders."""
    codes, entropy, brotli = (result[name] for name in ("code_bytes", "entropy_bytes", "brotli_bytes"))
    parts = result["part_bytes"]
    rest = ", ".join(f"{name} {size:,}" for name, size in parts.items() if name != "states")
    return (
        f"\n{_named(key)}: codes {codes:,} bytes with the entropy coder, {brotli:,} with brotli 11 "
        f"({codes / brotli - 1:+.2%}), {entropy:,} at the order-0 entropy of each matrix; {rest}.\n"
    )


def _corrections(record: dict | None) -> str:
    if record is None:
        return ""
    mean = record["mean"]
    return (
        f"\n`benchmarks/corrections.py`, means over {len(record['matrices'])} matrices rounded by GPTQ to steps of "
        f"{record['step']:g} standard deviations: a correction of rank {record['rank']} removes {mean['removed']:.1%} "
        f"of the squared error of the outputs; its bytes as a finer step remove {mean['removed_by_finer_step']:.1%}. "
        f"The codes have {mean['entropy']:.4f} bits of entropy, and {mean['entropy_given_neighbours']:.4f} with the "
        f"magnitudes of their neighbours as context. A step per column would take "
        f"{mean['bits_of_column_steps']:.3f} bits per weight less.\n"
    )
