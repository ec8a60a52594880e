"""The sections of docs/results.md on serving, from the records of benchmarks/serving.py, and on exports in vLLM, from
that of benchmarks/vllm_logprobs.py."""

SERVING = tuple(f"benchmarks/results/serving-{name}.json" for name in ("mla", "gdn"))
VLLM = "benchmarks/results/vllm.json"


def serving_section(records: list[dict]) -> str:
    if not records:
        return ""
    page = "\n# Serving\n\nBy `benchmarks/serving.py`, over HTTP, on one GPU: 64 clients with one streamed request "
    page += "after another, against the same requests one by one; and requests that share a beginning of 8,192 tokens, "
    page += "with and without the prefix cache. Weights are random. Medians, and in brackets 95th percentiles.\n\n"
    head = ["model", "clients", "tokens/s", "of one by one", "first token, ms", "between tokens, ms"]
    page += f"| {' | '.join(head)} |\n" + "|---" * len(head) + "|\n"
    for record in records:
        for name, beside in (("one by one", ""), ("together", f"{record['clients']['speedup']:.1f}×")):
            found = record["clients"][name]
            cells = [_name(record), "64" if name == "together" else "1", f"{found['tokens_per_second']:,.0f}", beside]
            page += f"| {' | '.join([*cells, *map(_milliseconds, _times(found))])} |\n"
        cells = [_name(record), "none: the engine alone", f"{record['clients']['engine_tokens_per_second']:,.0f}"]
        page += f"| {' | '.join([*cells, '', '', ''])} |\n"
    page += "\n| model | shared beginning | first token, ms | sooner |\n|---|---|---|---|\n"
    for record in records:
        prefix = record["prefix"]
        for name, beside in (("without cache", ""), ("with cache", f"{prefix['speedup']:.1f}×")):
            page += f"| {_name(record)} | {name} | {_milliseconds(prefix[name]['first_token_seconds'])} | {beside} |\n"
    page += "\n" + "".join(f"{_name(record)}: {_made(record)}\n" for record in records)
    return page


def vllm_section(record: dict | None) -> str:
    if record is None:
        return ""
    made = record["environment"]
    page = f"\n# Exports in vLLM\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, vLLM "
    page += f"{made['vllm']}, torch {made['torch']}, commit {made['git_commit'][:7]}. Log-probabilities of prompts in "
    page += "bfloat16, their distance from Transformers' in float32 on the same files; and how many greedy tokens are "
    page += "those of Transformers in float32.\n\n"
    page += "| class | by | largest difference | mean | equal tokens |\n|---|---|---|---|---|\n"
    for row in record["rows"]:
        for name in ("vllm", "transformers"):
            found, n = row[name], row["new"] * len(row["prompts"])
            cells = [row["architecture"], {"vllm": "vLLM", "transformers": "Transformers, bfloat16"}[name]]
            cells += [f"{found['largest_difference']:.3f}", f"{found['mean_difference']:.4f}"]
            cells.append(f"{sum(found['equal_tokens'])} of {n}")
            page += f"| {' | '.join(cells)} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")


def _name(record: dict) -> str:
    return "gdn" if record["overrides"] else "mla"


def _times(found: dict) -> tuple[dict, dict]:
    return found["first_token_seconds"], found["between_tokens_seconds"]


def _milliseconds(quantiles: dict) -> str:
    return f"{1e3 * quantiles['p50']:.1f} ({1e3 * quantiles['p95']:.1f})"


def _made(record: dict) -> str:
    made = record["environment"]
    return (
        f"{' '.join([record['recipe'], *(f'`{one}`' for one in record['overrides'])])}, {made['date'][:10]}, "
        f"{made['device_name']}, {made['dtype']}, torch {made['torch']}, commit {made['git_commit'][:7]}."
    )
