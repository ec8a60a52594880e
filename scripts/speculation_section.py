"""The section of docs/results.md on speculative decoding, from the record of benchmarks/speculation.py."""

SPECULATION = "benchmarks/results/speculation.json"


def speculation_section(record: dict | None) -> str:
    if record is None:
        return ""
    made = record["environment"]
    page = f"\n# Speculative decoding\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, "
    page += f"{made['dtype']}, torch {made['torch']}, commit {made['git_commit'][:7]}. {record['recipe']}, "
    page += f"{record['parameters'] / 1e6:,.0f} million parameters, with {record['modules']} module of multi-token "
    page += f"prediction; prompts are {record['prompt_tokens']} tokens of held-out text, {record['tokens']} tokens "
    page += "follow. Kept: of the steps, those that kept the draft at that place.\n\n"
    page += "| rows | temperature | drafts | tokens/s | beside plain | tokens per step | kept, by place |\n"
    page += "|---" * 7 + "|\n"
    for row in record["rows"]:
        kept = ", ".join(f"{fraction:.0%}" for fraction in row.get("acceptance", []))
        cells = [str(row["batch"]), f"{row['temperature']:g}", str(row["drafts"]), f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['over_plain']:.2f}×", f"{row.get('tokens_per_step', 1.0):.2f}", kept or "–"]
        page += f"| {' | '.join(cells)} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")
