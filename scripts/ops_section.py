"""The part of docs/results.md about operations, from the records of benchmarks/run.py and benchmarks/end_to_end.py."""

import itertools
from pathlib import Path

OPS = "benchmarks/results/ops.json"
STEPS = "benchmarks/results/steps.json"
IMAGES = "docs/images"
_OURS = "fusedlm"
_COLOURS = (
    "#b03060", "#d4709a", "#e8a8c0", "#303a5c", "#5c78b8", "#90a8d8", "#7a9a5a", "#c0a040", "#909090", "#202020",
)  # fmt: skip


def ops_section(record: dict | None, steps: dict | None) -> str:
    return _ops(record) + _steps(steps)


def _made(record: dict) -> str:
    e = record["environment"]
    return (
        f"{e['date'][:10]}; {e['device_name']}, python {e['python']}, torch {e['torch']}, triton {e['triton']}, "
        f"commit {e['git_commit'][:7]}"
    )


def _ops(record: dict | None) -> str:
    if record is None:
        return ""
    ceilings = record["ceilings"]
    page = f"\n# Operations\n\n    {record['command']}\n\n{_made(record)}. Ceilings of the same run: a copy moves "
    page += f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s, a product of 8192³ runs at "
    page += f"{ceilings['flops_per_second'] / 1e12:,.0f} TFLOP/s. The floor is the fewest bytes or the FLOPs at these, "
    page += "whichever takes longer; what is worse than twice eager PyTorch against float64 is called wrong and not "
    page += "timed. Times are medians of replays of a CUDA graph, of one contender after the other in an order that "
    page += "changes. Liger and cut cross entropy wait for the device, which a graph cannot hold; theirs are of calls. "
    page += "Memory is what is held beyond inputs, outputs and gradients.\n"
    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        page += f"\n## {op}\n\n| shape | | contender | ms | of the floor | beyond, MiB | error |\n" + "|---" * 7 + "|\n"
        for case in record["cases"]:
            if case["op"] == op:
                page += "".join(_row(case, one, i == 0) for i, one in enumerate(case["contenders"]))
        page += f"\n![Share of the floor reached by each contender](images/ops-{op}.png)\n"
    return page + _note(record)


def _row(case: dict, one: dict, first: bool) -> str:
    where = [f"{case['shape']}, {case['dtype']}", case["direction"]] if first else ["", ""]
    name = f"**{one['name']}**" if one["name"].startswith(_OURS) else one["name"]
    error = f"{max(one['errors']):.1e}" if one["errors"] else "–"
    beyond = "–" if one["extra_mib"] is None else f"{one['extra_mib']:,.0f}"
    if one["milliseconds"] is None:
        cells = [*where, name, one["reason"], "–", beyond, error]
    else:
        share = case["floor_ms"] / one["milliseconds"]
        cells = [*where, name, f"{one['milliseconds']:.4f}", f"{share:.0%}", beyond, error]
    return f"| {' | '.join(cells)} |\n"


def _note(record: dict) -> str:
    return f"\n{record['note']}\n" if "note" in record else ""


def _steps(record: dict | None) -> str:
    if record is None:
        return ""
    page = f"\n# A training step with the fused ops and without\n\n    {record['command']}\n\n{_made(record)}. "
    page += "torch.compile is on everywhere; random tokens, medians of eight.\n\n"
    page += "| step | implementations | tokens/s | | MFU | peak memory |\n|---|---|---|---|---|---|\n"
    for case in record["cases"]:
        base = case["ways"]["reference"]["tokens_per_second"]
        for way, r in case["ways"].items():
            page += f"| {case['name']} | {way} | {r['tokens_per_second']:,.0f} | {r['tokens_per_second'] / base:.3f}× "
            page += f"| {r['mfu']:.1%} | {r['peak_memory_gib']:.2f} GiB |\n"
    for case in record["cases"]:
        for way, r in case["ways"].items():
            if "profile" in r:
                page += _profile(f"{case['name']}, {way}", r["profile"])
    return page + _note(record)


def _profile(title: str, profile: dict) -> str:
    page = f"\n## Kernels of a step: {title}\n\n{profile['kernel_ms']:.1f} ms of kernels; "
    page += f"{profile['share_near_floor']:.1%} of the time is spent in kernels at 80% of their floor or above, "
    page += f"{profile['share_of_unknown_floor']:.1%} in kernels whose floor is not known.\n\n"
    page += "| ms | calls | of the floor | kernel | launched by |\n|---|---|---|---|---|\n"
    for row in profile["heaviest"]:
        share = "–" if row["floor_ms"] is None else f"{row['floor_ms'] / row['milliseconds']:.0%}"
        page += f"| {row['milliseconds']:.2f} | {row['calls']} | {share} | `{row['kernel'][:70]}` | {row['op']} |\n"
    page += "\n| launched by | ms | above known floors | of the step | of unknown floor |\n|---|---|---|---|---|\n"
    for name, group in sorted(profile["groups"].items(), key=lambda item: -item[1]["milliseconds"]):
        above, unknown = group["above_floor_ms"], group["unknown_floor_ms"]
        page += f"| {name} | {group['milliseconds']:.2f} | {above:.2f} | {above / profile['kernel_ms']:.1%} "
        page += f"| {unknown:.2f} |\n"
    return page


def draw_ops(record: dict, folder: Path) -> None:
    """For each op bars of the share of the floor, a group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(one["name"] for case in record["cases"] for one in case["contenders"]))
    colours = dict(
        zip(sorted(names, key=lambda name: not name.startswith(_OURS)), itertools.cycle(_COLOURS), strict=False)
    )
    for op in dict.fromkeys(case["op"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["op"] == op]
        rows, labels, ticks = [], [], []
        for case in cases:
            start = len(rows) + len(ticks)  # a free line between cases
            timed = [one for one in case["contenders"] if one["milliseconds"] is not None]
            ticks.append(start + (len(timed) - 1) / 2)
            labels.append(f"{case['shape']}\n{case['direction']}")
            rows += [(start + i, one["name"], case["floor_ms"] / one["milliseconds"]) for i, one in enumerate(timed)]
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.14 * (len(rows) + len(ticks))), layout="constrained")
        for name in dict.fromkeys(name for _, name, _ in rows):
            own = [(place, share) for place, of, share in rows if of == name]
            axes.barh(*zip(*own, strict=True), 0.9, label=name, color=colours[name])
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(ticks, labels, fontsize=7)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel(f"{op}: share of the floor (1: as fast as the device's measured ceilings allow)", fontsize=8)
        figure.legend(loc="outside upper center", ncols=4, fontsize=7)
        figure.savefig(folder / f"ops-{op}.png", dpi=110)
        pyplot.close(figure)
