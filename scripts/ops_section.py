"""The sections of docs/results.md on operations, from the records of benchmarks/run.py and benchmarks/end_to_end.py."""

import itertools
from pathlib import Path

_RECORDS = (
    "ops", "ops-linear-time", "ops-orthogonalize", "ops-routed", "ops-sonic-moe", "ops-quantized-linear",
    "ops-quantized-experts", "ops-wiring",
)  # fmt: skip
OPS = tuple(f"benchmarks/results/{name}.json" for name in _RECORDS)
STEPS = "benchmarks/results/steps.json"
IMAGES = "docs/images"
_OURS = "fusedlm"
_LESS_EXACT = "†"
_OUR_COLOUR, _PEER_COLOUR = "#b03060", "#90a8d8"
_COLUMNS = 2  # of panels
_TITLE = 62  # characters that fit over one


def ops_section(records: list[dict], steps: dict | None) -> str:
    return "".join(_ops(record, i == 0) for i, record in enumerate(records)) + _steps(steps)


def _environment(record: dict) -> str:
    e = record["environment"]
    return (
        f"{e['date'][:10]}; {e['device_name']}, python {e['python']}, torch {e['torch']}, triton {e['triton']}, "
        f"commit {e['git_commit'][:7]}"
    )


def _ops(record: dict, is_first: bool) -> str:
    ceilings = record["ceilings"]
    page = f"\n# {record.get('title', 'Operations')}\n\n    {record['command']}\n\n{_environment(record)}. In the same "
    page += (
        f"run a copy moves {ceilings['bytes_per_second'] / 1e9:,.0f} GB/s and a matrix product of size 8192 runs at "
    )
    page += f"{ceilings['flops_per_second'] / 1e12:,.0f} TFLOP/s. {_bound(record)}\n"
    if is_first:
        page += "The floor is the time of the fewest bytes or of the FLOPs at these rates, whichever is longer. Times "
        page += "are medians of replays of a CUDA graph, with the contenders interleaved. Liger and cut cross entropy "
        page += "synchronize with the device, which a graph cannot capture; their times are of plain calls. Memory is "
        page += "the peak beyond inputs, outputs and gradients.\n"
    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        page += f"\n## {op}\n\n| shape | | contender | ms | of the floor | memory, MiB | error |\n" + "|---" * 7 + "|\n"
        for case in record["cases"]:
            if case["op"] == op:
                page += "".join(_row(case, one, i == 0) for i, one in enumerate(case["contenders"]))
        page += f"\n![Milliseconds of each contender](images/{_picture(record, op)})\n"
    return page + _note(record)


def _picture(record: dict, op: str) -> str:
    """The file name. An op that several records have has a picture of each."""
    return f"ops-{op}{record.get('picture', '')}.png"


def _bound(record: dict) -> str:
    """How errors are judged. Records before `error_over_bound` have no time for any contender beyond the bound."""
    if any("error_over_bound" in one for case in record["cases"] for one in case["contenders"]):
        return f"{_LESS_EXACT} marks a peer whose error against float64 is more than twice that of eager PyTorch."
    return "A contender whose error against float64 is more than twice that of eager PyTorch is wrong and has no time."


def _is_less_exact(one: dict) -> bool:
    return (one.get("error_over_bound") or 0) > 1


def _row(case: dict, one: dict, first: bool) -> str:
    where = [f"{case['shape']}, {case['dtype']}", case["direction"]] if first else ["", ""]
    name = f"**{one['name']}**" if one["name"].startswith(_OURS) else one["name"]
    error = f"{max(one['errors']):.1e}" if one["errors"] else "–"
    memory = "–" if one["extra_mib"] is None else f"{one['extra_mib']:,.0f}"
    mark = ""
    if _is_less_exact(one):
        mark, error = f" {_LESS_EXACT}", f"{error}, up to {one['error_over_bound']:.2g}× the bound"
    if one["milliseconds"] is None:
        cells = [*where, name, one["reason"], "–", memory, error]
    else:
        fraction = case["floor_ms"] / one["milliseconds"]
        cells = [*where, name, f"{one['milliseconds']:.4f}{mark}", f"{fraction:.0%}", memory, error]
    return f"| {' | '.join(cells)} |\n"


def _note(record: dict) -> str:
    return f"\n{record['note']}\n" if "note" in record else ""


def _steps(record: dict | None) -> str:
    if record is None:
        return ""
    page = f"\n# A training step with and without fused ops\n\n    {record['command']}\n\n{_environment(record)}. "
    page += "All with torch.compile, on random tokens; medians of eight.\n\n"
    page += "| step | backends | tokens/s | | MFU | peak memory |\n|---|---|---|---|---|---|\n"
    for case in record["cases"]:
        base = _variants(case)["reference"]["tokens_per_second"]
        for name, r in _variants(case).items():
            page += f"| {case['name']} | {name} | {r['tokens_per_second']:,.0f} | {r['tokens_per_second'] / base:.3f}× "
            page += f"| {r['mfu']:.1%} | {r['peak_memory_gib']:.2f} GiB |\n"
    for case in record["cases"]:
        for name, r in _variants(case).items():
            if "profile" in r:
                page += _profile(f"{case['name']}, {name}", r["profile"])
    return page + _note(record)


def _variants(case: dict) -> dict[str, dict]:
    """By name what was measured; older records call them ways."""
    return case["variants"] if "variants" in case else case["ways"]


def _profile(title: str, profile: dict) -> str:
    page = f"\n## Kernels of a step: {title}\n\n{profile['kernel_ms']:.1f} ms of kernels; "
    page += f"{profile['share_near_floor']:.1%} of the time is in kernels at 80% of their floor or above, "
    page += f"{profile['share_of_unknown_floor']:.1%} in kernels whose floor is unknown.\n\n"
    page += "| ms | calls | of the floor | kernel | launched by |\n|---|---|---|---|---|\n"
    for row in profile["heaviest"]:
        fraction = "–" if row["floor_ms"] is None else f"{row['floor_ms'] / row['milliseconds']:.0%}"
        page += f"| {row['milliseconds']:.2f} | {row['calls']} | {fraction} | `{row['kernel'][:70]}` | {row['op']} |\n"
    page += "\n| launched by | ms | above known floors | of the step | of unknown floor |\n|---|---|---|---|---|\n"
    for name, group in sorted(profile["groups"].items(), key=lambda item: -item[1]["milliseconds"]):
        above, unknown = group["above_floor_ms"], group["unknown_floor_ms"]
        page += f"| {name} | {group['milliseconds']:.2f} | {above:.2f} | {above / profile['kernel_ms']:.1%} "
        page += f"| {unknown:.2f} |\n"
    return page


def draw_ops(record: dict, folder: Path) -> None:
    """For each op a panel of each case: bars of milliseconds, and a line at the floor; hatched: less exact than the
    bound. The hardware is in the title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["op"] == op]
        rows = [cases[i : i + _COLUMNS] for i in range(0, len(cases), _COLUMNS)]
        heights = [_height(row) for row in rows]
        figure, panels = pyplot.subplots(
            len(rows),
            _COLUMNS,
            figsize=(10, 0.9 + sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for axes, case in itertools.zip_longest(panels.ravel(), cases):
            axes.set_axis_off() if case is None else _draw_case(axes, case)
        less_exact = any(_is_less_exact(one) for case in cases for one in _timed(case))
        how = f"milliseconds; dashed: the floor of this device{'; hatched: less exact' if less_exact else ''}"
        figure.suptitle(f"{op} on {_hardware(record)}\n{how}", fontsize=9)
        figure.savefig(folder / _picture(record, op), dpi=110, metadata={"Software": None})
        pyplot.close(figure)


def _height(row: list[dict]) -> float:
    """Inches of a row of panels."""
    return 0.75 + 0.2 * max(len(_timed(case)) for case in row) + 0.12 * any("\n" in _title(case) for case in row)


def _draw_case(axes, case: dict) -> None:
    timed = _timed(case)
    longest = max((one["milliseconds"] for one in timed), default=case["floor_ms"])
    for place, one in enumerate(timed):
        ours = one["name"].startswith(_OURS)
        hatching = {"edgecolor": "white", "linewidth": 0, "hatch": "////"} if _is_less_exact(one) else {}
        axes.barh(place, one["milliseconds"], 0.78, facecolor=_OUR_COLOUR if ours else _PEER_COLOUR, **hatching)
        written = f"{one['milliseconds']:#.3g}".rstrip(".")
        text = f" {written} ms, {case['floor_ms'] / one['milliseconds']:.0%} of the floor"
        axes.text(one["milliseconds"], place, text, va="center", fontsize=7)
    axes.axvline(case["floor_ms"], color="#24292f", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(timed)), [one["name"] for one in timed], fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.75 * longest)  # with space for the figures
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(case), fontsize=8, loc="left")


def _title(case: dict) -> str:
    """In two lines where one is wider than a panel."""
    shape, how = case["shape"], f"{case['dtype']}, {case['direction']}"
    return f"{shape}, {how}" if len(shape) + len(how) < _TITLE else f"{shape}\n{how}"


def _timed(case: dict) -> list[dict]:
    return [one for one in case["contenders"] if one["milliseconds"] is not None]


def _hardware(record: dict) -> str:
    made = record["environment"]
    return f"{made['device_name']}, torch {made['torch']}, {made['date'][:10]}"
