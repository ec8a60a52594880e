"""The section of docs/results.md on linear layers in 8 bits, from the record of benchmarks/quantised_linear.py."""

QUANTISED_LINEAR = "benchmarks/results/quantised-linear.json"


def low_precision_section(record: dict | None) -> str:
    if record is None:
        return ""
    made, ceilings = record["environment"], record["ceilings"]
    page = f"\n# Linear layers in 8 bits\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, "
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


def _cell(contender: dict) -> str:
    if contender["milliseconds"] is None:
        return "–"
    speedup = "" if contender["speedup"] is None else f" ({contender['speedup']:.2f}×)"
    return f"{contender['milliseconds']:.3f}{speedup}"
