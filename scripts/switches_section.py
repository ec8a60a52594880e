"""The section of docs/results.md on experiments that turn each switch off in one model and on in another."""

from fusedlm.compare.statistics import Summary, summarise

_WHOLE, _PLAIN = "full", "plain"
_OFF, _ON = "no-", "only-"  # before the name of a switch: a variant of the whole, and of the plain model
_MATCHED = {"params": "parameters", "time": "time"}


def switches_section(records: list[dict]) -> str:
    """A row per switch: what turning it off adds to the loss of the whole, and what turning it on adds to that of the
    plain model, in each record of the experiment. Empty if there is no such experiment.

    Args:
        records: of all experiments.
    """
    found: dict[str, list[dict]] = {}
    for record in records:
        if {_WHOLE, _PLAIN} <= record["variants"].keys():
            found.setdefault(record["name"], []).append(record)
    return "".join(_table(name, group) for name, group in found.items() if _switches(group[0]))


def _switches(record: dict) -> list[str]:
    names = (_switch_of(name) for name in record["variants"])
    return list(dict.fromkeys(name for name in names if name is not None))


def _switch_of(variant: str) -> str | None:
    """The switch that a variant turns; None: it turns none."""
    prefix = next((prefix for prefix in (_OFF, _ON) if variant.startswith(prefix)), None)
    return None if prefix is None else variant.removeprefix(prefix)


def _table(name: str, records: list[dict]) -> str:
    page = f"\n## {name}, by switch\n\nBits per byte that a switch adds to the loss, paired by seed, with the half "
    page += "width of the 95% interval by Student's t: negative is better. Bold: the interval excludes zero.\n\n"
    sides = [(_OFF, _WHOLE, "off, against full"), (_ON, _PLAIN, "on, against plain")]
    head = ["switch"]
    head += [f"{title}, equal {_matched(record)}" for _, _, title in sides for record in records]
    rows = [head, ["---"] * len(head)]
    for switch in _switches(records[0]):
        cells = [_cell(difference(record, prefix + switch, base)) for prefix, base, _ in sides for record in records]
        rows.append([switch, *cells])
    whole = [_cell(difference(record, _WHOLE, _PLAIN)) for record in records]
    rows.append(["all of them", *["–"] * len(records), *whole])
    return page + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _matched(record: dict) -> str:
    match = record["experiment"]["match"]
    return _MATCHED.get(match, match)


def difference(record: dict, variant: str, base: str) -> Summary:
    """Bits per byte of a variant less those of another, over the seeds that both have finished."""
    losses = [
        {run["seed"]: run["val_bpb"] for run in record["runs"] if run["variant"] == name and run["val_bpb"] is not None}
        for name in (variant, base)
    ]
    return summarise([losses[0][seed] - losses[1][seed] for seed in losses[0] if seed in losses[1]])


def _cell(found: Summary) -> str:
    if not found.n:
        return "–"
    if found.low is None:
        return f"{found.mean:+.4f}"
    text = f"{found.mean:+.4f} ± {(found.high - found.low) / 2:.4f}"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text
