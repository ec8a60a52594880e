"""The section of docs/results.md on decoding in few bits, from the record of benchmarks/quantized_decoding.py."""

QUANTIZED_DECODING = "benchmarks/results/quantized-decoding.json"


def quantized_decoding_section(record: dict | None) -> str:
    if record is None:
        return ""
    made, base = record["environment"], record["rows"][0]["decoding"]
    page = f"\n# Decoding in few bits\n\n    {record['command']}\n\n{made['date'][:10]}; {made['device_name']}, "
    page += f"{made['dtype']}, torch {made['torch']}, triton {made['triton']}, commit {made['git_commit'][:7]}. "
    page += f"{record['recipe']}; {record['tokens']} tokens follow prompts of {record['prompt_tokens']}, steps are "
    page += "CUDA graphs.\n\n| weights | MB | bits per byte |"
    page += "".join(f" tokens/s, {n} row{'s' * (n != '1')} | |" for n in base) + "\n" + "|---" * (3 + 2 * len(base))
    page += "|\n"
    for row in record["rows"]:
        cells = [row.get("name") or row["format"] or made["dtype"], f"{row['weight_bytes'] / 1e6:,.0f}"]
        cells.append(f"{row['bits_per_byte']:.4f}")
        for n, found in row["decoding"].items():
            speed = found["tokens_per_second"]
            cells += [f"{speed:,.0f}", f"{speed / base[n]['tokens_per_second']:.2f}×"]
        page += f"| {' | '.join(cells)} |\n"
    return page + (f"\n{record['note']}\n" if "note" in record else "")
