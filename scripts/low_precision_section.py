"""The sections of docs/results.md on 8 bits, from the records of benchmarks/quantised_linear.py and outliers.py."""

QUANTISED_LINEAR = "benchmarks/results/quantised-linear.json"
OUTLIERS = "benchmarks/results/outliers.json"
OUTLIERS_COST = "benchmarks/results/outliers-cost.json"


def low_precision_section(record: dict | None, title: str = "# Linear layers in 8 bits") -> str:
    if record is None:
        return ""
    made, ceilings = record["environment"], record["ceilings"]
    page = f"\n{title}\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, "
    page += f"torch {made['torch']}, triton {made['triton']}, commit {made['git_commit'][:7]}; copies "
    page += f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s, bf16 {ceilings['flops_per_second'] / 1e12:,.0f} TFLOP/s. "
    page += "Milliseconds of forward and backward as a CUDA graph, with the casts of input, gradient and weight; in "
    page += "brackets how many times as fast as bf16. Shapes are tokens, inputs, outputs.\n\n"
    shapes = [case["shape"] for case in record["cases"]]
    page += f"| | {' | '.join(shapes)} |\n" + "|---" * (1 + len(shapes)) + "|\n"
    for name in [contender["name"] for contender in record["cases"][0]["contenders"]]:
        found = [next(c for c in case["contenders"] if c["name"] == name) for case in record["cases"]]
        if any(contender["milliseconds"] for contender in found):
            page += f"| {name} | {' | '.join(map(_cell, found))} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def outliers_section(record: dict | None, cost: dict | None) -> str:
    """What isolating outliers saves, and what it costs."""
    if record is None:
        return ""
    made = record["environment"]
    page = f"\n# Outliers in 8 bits\n\n    {record['command']}\n\n{made['date'][:10]}; torch {made['torch']}, commit "
    page += f"{made['git_commit'][:7]}; {record['tokens']:,} tokens, by the emulation on the CPU. Loss: nats per "
    page += "token above float32. Gradients: the norm of their error, of the hidden matrices, over their norm. "
    factor = f"{record['factor']:g}"
    page += f"Planted: columns of each input times {factor}, with those of the weight divided by {factor}. Columns: "
    page += "share of those that leave the 8-bit products, and of those with a z-score above "
    page += f"{record['threshold']:g} that had no place.\n\n"
    page += "| planted | format | loss | gradients | isolated: loss | gradients | columns | without a place |\n"
    page += "|---" * 8 + "|\n"
    plain = {(row["planted"], row["format"]): row for row in record["rows"] if not row["isolated"]}
    for row in (row for row in record["rows"] if row["isolated"]):
        cells = [str(row["planted"]), row["format"]]
        for one in (plain[row["planted"], row["format"]], row):
            cells += [f"{one['loss'] - one['exact_loss']:+.5f}", f"{one['gradient_error']:.1%}"]
        cells += [f"{row['share']:.2%}", f"{row['missed']:.2%}"]
        page += f"| {' | '.join(cells)} |\n"
    return page + low_precision_section(cost, "## The time of isolating them")


def _cell(contender: dict) -> str:
    if contender["milliseconds"] is None:
        return "–"
    speedup = "" if contender["speedup"] is None else f" ({contender['speedup']:.2f}×)"
    return f"{contender['milliseconds']:.3f}{speedup}"
