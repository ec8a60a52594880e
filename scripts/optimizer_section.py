"""The section of docs/results.md on whole optimizer steps, from the record of benchmarks/optimizer_step.py."""

OPTIMIZER_STEP = "benchmarks/results/optimizer-step.json"


def optimizer_section(record: dict | None) -> str:
    if record is None:
        return ""
    e, parameters, matrices = record["environment"], record["parameters"], record["matrix_parameters"]
    page = f"\n# A step of the optimizer\n\n    {record['command']}\n\n{e['date'][:10]}; {e['device_name']}, torch "
    page += f"{e['torch']}, triton {e['triton']}, commit {e['git_commit'][:7]}. On the {parameters:,} parameters of "
    page += f"{record['recipe']}, {matrices:,} of them in hidden matrices. The floor is the time of the bytes that a "
    page += "step reads and writes, plus that of its products, at measured rates.\n\n"
    page += "| optimizer | ms | as a CUDA graph, ms | floor, ms | the host is busy, ms |\n" + "|---" * 5 + "|\n"
    for case in record["cases"]:
        captured = case["graph_milliseconds"]
        cells = [f"`{case['optimizer']}`", f"{case['milliseconds']:.2f}"]
        cells.append(case["graph_reason"] if captured is None else f"{captured:.2f}")
        cells += [f"{case['floor_milliseconds']:.2f}", f"{case['host_milliseconds']:.2f}"]
        page += f"| {' | '.join(cells)} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")
