"""Numbers with units, for people."""

import math

_POWERS = ((1e12, "T", "trillions"), (1e9, "B", "billions"), (1e6, "M", "millions"), (1e3, "k", "thousands"))


def power_of(largest: float) -> tuple[float, str]:
    """The divisor for an axis that ends at `largest`, and its name (empty for 1)."""
    for power, _, word in _POWERS:
        if largest >= power:
            return power, word
    return 1.0, ""


def count(value: float | None) -> str:
    """1234567 gives 1.23 M."""
    if value is None or not math.isfinite(value):
        return "–"
    # Compared after rounding to three digits: 999,999 is 1.00 M, not 1000 k.
    rounded = float(f"{value:.3g}")
    for power, letter, _ in _POWERS:
        if abs(rounded) >= power:
            digits = 2 - int(math.floor(math.log10(abs(rounded) / power) + 1e-9))
            return f"{rounded / power:.{max(digits, 0)}f} {letter}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """3725 gives 1 h 2 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def memory_unit(largest: float) -> tuple[float, str]:
    """The divisor for bytes, and its unit."""
    return (2.0**30, "GiB") if largest >= 2**30 else (2.0**20, "MiB")


def memory(n_bytes: float | None) -> str:
    if n_bytes is None or not math.isfinite(n_bytes):
        return "–"
    size, unit = memory_unit(n_bytes)
    return f"{n_bytes / size:.2f} {unit}" if unit == "GiB" else f"{n_bytes / size:.0f} {unit}"


def percent(fraction: float | None) -> str:
    if fraction is None or not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:.1f}%" if fraction >= 0.0995 or fraction == 0 else f"{100 * fraction:.2f}%"


def size(n_bytes: float | None) -> str:
    """1536 gives 1.5 KiB: the largest unit of which there is at least 1."""
    if n_bytes is None or not math.isfinite(n_bytes):
        return "–"
    for power, unit in ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if n_bytes >= power:
            return f"{n_bytes / power:.3g} {unit}" if n_bytes < 1000 * power else f"{n_bytes / power:.0f} {unit}"
    return f"{n_bytes:.0f} B"
