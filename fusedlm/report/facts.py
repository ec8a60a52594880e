"""What the header of a page says about a run: text, epochs, device, date. Lenient, since older runs record less."""

import math
from pathlib import PurePath

from fusedlm.report.text import shortened
from fusedlm.report.units import count, percent

_LONGEST = 160
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def header_facts(
    recipe: dict, environment: dict, tokens: float | None, sources: dict[str, tuple[float, float]] | None = None
) -> list[tuple[str, str]]:
    """(name, value), plain text.

    Args:
        recipe: of the run, as a tree of plain values; may lack anything.
        environment: of the run; `data` in it has the counts of `PreparedData.counts`.
        tokens: read in training.
        sources: tokens read, and epochs, of each of several sources.
    """
    counts = _dict(environment.get("data"))
    facts = [("Text", ", ".join(filter(None, (_source(recipe), _size(counts)))))]
    available = _positive(counts.get("training_tokens"))
    if available and tokens:
        epochs = tokens / available
        facts.append(("Epochs", f"{epochs:.3g}: {count(tokens)} tokens read of {count(available)} for training"))
    for name, (read, epochs) in (sources or {}).items():
        times = f", {epochs:.3g} epochs" if math.isfinite(epochs) else ""
        facts.append((f"Source {name}", f"{count(read)} tokens read{times}"))
    device = [environment.get("device_name"), environment.get("dtype")]
    facts.append(("Device", ", ".join(str(part) for part in device if part)))
    facts.append(("Date", str(environment.get("date") or "")[:10]))
    return [(name, shortened(value, _LONGEST)) for name, value in facts if value]


def _source(recipe: dict) -> str:
    data = _dict(recipe.get("data"))
    several = [_dict(_dict(one).get("source")) for one in _dict(data.get("sources")).values()]
    return ", ".join(filter(None, map(_named, several or [_dict(data.get("source"))])))


def _named(source: dict) -> str:
    path = source.get("path")
    paths = path if isinstance(path, list) else [path]
    names = [PurePath(one).name or one for one in paths if isinstance(one, str) and one]
    return ", ".join(names) or str(source.get("type") or "")


def _size(counts: dict) -> str:
    documents, n_bytes = _positive(counts.get("documents")), _positive(counts.get("bytes"))
    tokens, held_out = _positive(counts.get("tokens")), _positive(counts.get("held_out_bytes"))
    parts = [
        documents and f"{documents:,.0f} document{'s' * (documents != 1)}",
        n_bytes and _bytes(n_bytes),
        tokens and f"{count(tokens)} tokens",
        held_out and n_bytes and f"{percent(held_out / n_bytes)} of the bytes held out",
    ]
    return ", ".join(part for part in parts if part)


def _bytes(n: float) -> str:
    return next((f"{n / size:.3g} {unit}" for size, unit in _SIZES if n >= size), f"{n:.0f} bytes")


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _positive(value) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and value > 0 else None
