"""The section of docs/results.md on nanoGPT in the same minutes, from the record of benchmarks/nanogpt.py's runs."""

import statistics

NANOGPT = "benchmarks/results/nanogpt.json"
_COLUMNS = ["text of", "model", "parameters", "tokens", "bits per byte at the end", "by eval"]


def nanogpt_section(record: dict | None, runs: list[dict], experiments: list[dict]) -> str:
    """
    Args:
        record: `finals`, one run each beside a recipe or experiment of ours; and `trials`, of the learning rate.
        runs, experiments: our records, by whose names the rows of ours are found.
    """
    if record is None:
        return ""
    e = record["environment"]
    page = "\n# nanoGPT in the same minutes\n\n"
    page += "".join(f"    {final['command']}\n" for final in record["finals"])
    page += f"\n{e['date'][:10]}; {e['device_name']}, torch {e['torch']}, commit {e['git_commit'][:7]}. Windows of "
    page += "eval overlap by half.\n\n"
    page += f"| {' | '.join(_COLUMNS)} |\n" + "|---" * len(_COLUMNS) + "|\n"
    for final in record["finals"]:
        page += _row(final["recipe"], "nanoGPT", final, final["val_bpb"], final["eval_bpb"])
        page += _ours(final["recipe"], runs, experiments)
    page += "\n| trial: learning rate | dropout | steps | bits per byte |\n|---|---|---|---|\n"
    for trial in record["trials"]:
        page += f"| {trial['lr']:g} | {trial['dropout']:g} | {trial['steps']:,} | {trial['val_bpb']:.3f} |\n"
    return page + f"\n{record['note']}\n"


def _ours(recipe: str, runs: list[dict], experiments: list[dict]) -> str:
    """The rows of ours on the text of a recipe, in as many minutes."""
    page = ""
    for run in runs:
        if run["name"] == recipe:
            by_eval = statistics.mean(seed["eval"]["bpb"] for seed in run["seeds"])
            page += _row(recipe, f"`recipes/{run['name']}.yaml`, three seeds", run, run["val_bpb"], by_eval)
    for experiment in experiments:
        if experiment["experiment"]["base"].endswith(f"/{recipe}.yaml") and experiment["name"].endswith("ten-minutes"):
            for name, variant in experiment["variants"].items():
                what = f"{name} of [{experiment['name']}](#{experiment['name']})"
                page += _row(recipe, what, variant, variant["val_bpb"]["mean"], None)
    return page


def _row(recipe: str, what: str, run: dict, at_end: float, by_eval: float | None) -> str:
    parameters = f"{run['parameters'] / 1e6:.1f} M" if "parameters" in run else ""
    evaluated = f"{by_eval:.4f}" if by_eval is not None else ""
    return f"| {recipe} | {what} | {parameters} | {run['tokens'] / 1e6:,.0f} M | {at_end:.4f} | {evaluated} |\n"
