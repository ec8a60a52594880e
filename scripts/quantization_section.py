"""Write the tables of docs/quantization.md from the records of benchmarks/quantization.py.

    python scripts/quantization_section.py
"""

import json
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "benchmarks/results/quantization"
PAGE = REPOSITORY / "docs/quantization.md"
_BEGIN, _END = "<!-- tables of benchmarks/quantization.py -->", "<!-- end of the tables -->"
_KEY = re.compile(r"int(\d) (.+)")


def table(record: dict) -> str:
    """Bits per byte above those of the float32 weights, a row per method and a column per width."""
    results = record["results"]
    base = results["float"]["bpb"]
    cells: dict[str, dict[int, float]] = {}
    for key, result in results.items():
        if match := _KEY.fullmatch(key):
            cells.setdefault(match[2], {})[int(match[1])] = result["bpb"] - base
    widths = sorted({bits for row in cells.values() for bits in row}, reverse=True)
    lines = ["| method | " + " | ".join(f"int{bits}" for bits in widths) + " |", "|---|" + "---|" * len(widths)]
    for name, row in cells.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[b]:+.4f}" if b in row else "" for b in widths) + " |")
    sizes = [results.get(f"int{bits} gptq", {}).get("tensor_bytes") for bits in widths]
    lines.append("| MB of tensors, gptq | " + " | ".join("" if n is None else f"{n / 1e6:.3f}" for n in sizes) + " |")
    settings, note = record["settings"], record.get("note")
    scored = settings["eval_tokens"]
    lines += [
        "",
        f"{record['name']}: {base:.4f} bits per byte in float32; embeddings and head in int8 alone "
        f"{results['embeddings alone']['bpb'] - base:+.4f}. {settings['tokens']:,} tokens of calibration, "
        + (_scored(settings) if scored is None else f"{scored:,} held-out tokens")
        + f" scored.{' ' + note if note else ''}",
    ]
    return "\n".join(lines)


def _scored(settings: dict) -> str:
    if "text" not in settings:
        return "all held-out tokens"
    return f"{settings['documents']} whole documents of {settings['text']}, {settings['scored_bytes']:,} bytes,"


def replaced(page: str, records: list[dict]) -> str:
    """The page with the tables of these records."""
    before, after = page.split(_BEGIN)[0], page.split(_END)[1]
    return before + "\n\n".join([_BEGIN, *map(table, records), _END]) + after


def read_records(folder: Path) -> list[dict]:
    """The records in a folder, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def main() -> None:
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8"), read_records(RECORDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
