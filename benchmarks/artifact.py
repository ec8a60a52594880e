"""Bytes of the integer codes of trained runs: the entropy coder of `fusedlm pack` against brotli, LZMA and zstd.

    python benchmarks/artifact.py RUN [RUN ...] [--out FILE] [--page docs/artifact.md] [--settings 6/12.85/8/20 ...]

A setting is bits of matrices / their deviations / bits of embeddings and head / their deviations; deviations of 0: the
largest weight of the row. Each other coder gets every matrix alone, as it is, transposed, and with its columns sorted
by magnitude (whose order it would have to store; that is not counted), and counts with the smallest of the three; so
the bound of a coder without contexts, the entropy of each matrix, is of each alone. `fusedlm pack` counts with what the
file has for the same codes, its states included. brotli is measured where it is installed. Times are CPU seconds of one
thread. Results are added to the file; a run of the same name and setting is replaced.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch

from fusedlm import load
from fusedlm.files import write_atomic
from fusedlm.quant.artifact import read_artifact
from fusedlm.quant.artifact.coders import compress
from fusedlm.quant.artifact.contents import contents
from fusedlm.quant.artifact.table import RANS, STATES
from fusedlm.quant.artifact.write import pack
from fusedlm.quant.plain_rounding import Rounding, round_model
from fusedlm.runs.hardware import environment

BEGIN, END = "<!-- artifact -->\n", "<!-- end of artifact -->\n"
SETTINGS = ("6/12.85/8/20", "6/0/8/0", "4/6/6/12.85", "8/20/8/20")
RESULTS = Path("benchmarks/results/artifact.json")


def arrangements(codes: np.ndarray) -> list[bytes]:
    """The bytes of a matrix as it is, transposed, and with its columns sorted by magnitude."""
    order = np.argsort(np.abs(codes.astype(np.int64)).sum(0), kind="stable")
    return [codes.tobytes(), codes.T.tobytes(), np.ascontiguousarray(codes[:, order].T).tobytes()]


def entropy(codes: np.ndarray) -> float:
    """Bytes of a matrix if each code took its order-0 entropy."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


def measure(run: Path, setting: str) -> dict:
    """One entry of the record."""
    bits, deviations, table_bits, table_deviations = map(float, setting.split("/"))
    model, tokenizer, recipe = load(run, device="cpu")
    matrices = Rounding(int(bits), deviations or None)
    rounded = round_model(model, matrices, Rounding(int(table_bits), table_deviations or None))
    others = ["lzma", "zstd"] + (["brotli"] if importlib.util.find_spec("brotli") else [])
    sizes = dict.fromkeys(others, 0) | {"best of these": 0, "entropy": 0.0}
    for matrix in rounded.values():
        codes = matrix.codes.numpy()
        smallest = dict.fromkeys(others, codes.size)
        for data in arrangements(codes):
            for coder, coded in compress(data, others).items():
                smallest[coder] = min(smallest[coder], len(coded))
        for coder, size in smallest.items():
            sizes[coder] += size
        sizes["best of these"] += min(smallest.values())
        sizes["entropy"] += entropy(codes)
    sizes["entropy"] = round(sizes["entropy"])
    tensors = contents(model, rounded, torch.float16)
    started = time.process_time()
    packed = pack(tensors, recipe, tokenizer, step=0, text="none")
    packing = time.process_time() - started
    header = packed.header
    states = sum(part.bytes for part in header.parts if part.kind == STATES)
    sizes["fusedlm pack"] = states + sum(matrix.bytes for matrix in header.matrices)
    path = run / "benchmark.flm"
    path.write_bytes(packed.content)
    try:
        started = time.process_time()
        read_artifact(path)
        reading = time.process_time() - started
    finally:
        path.unlink()
    return {
        "recipe": recipe.name,
        "steps": recipe.train.steps,
        "setting": setting,
        "elements": sum(matrix.codes.numel() for matrix in rounded.values()),
        "code_bytes": sizes,
        "matrices_by_coder": {
            coder: sum(matrix.coder == coder for matrix in header.matrices)
            for coder in sorted({RANS, *(matrix.coder for matrix in header.matrices)})
        },
        "file_bytes": len(packed.content),
        "pack_seconds": round(packing, 2),
        "read_seconds": round(reading, 2),
    }


def table(record: dict) -> str:
    """The table of docs/artifact.md."""
    lines = [
        "| run | bits/deviations of matrices, of tables | codes | LZMA | zstd | brotli | best of each | entropy "
        "| ours | ours against the best | bits a code | read |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in record["entries"]:
        sizes = entry["code_bytes"]
        kilo = [f"{sizes[name] / 1000:,.1f}" if name in sizes else "–" for name in ("lzma", "zstd", "brotli")]
        kilo += [f"{sizes[name] / 1000:,.1f}" for name in ("best of these", "entropy", "fusedlm pack")]
        bits, deviations, table_bits, table_deviations = entry["setting"].split("/")
        setting = f"{bits}/{_reach(deviations)}, {table_bits}/{_reach(table_deviations)}"
        less = sizes["fusedlm pack"] / sizes["best of these"] - 1
        coded = 8 * sizes["fusedlm pack"] / entry["elements"]
        lines.append(
            f"| {entry['recipe']}, {entry['steps']} steps | {setting} | {entry['elements'] / 1e6:.2f} M | "
            f"{' | '.join(kilo)} | {less:+.2%} | {coded:.3f} | {entry['read_seconds']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def _reach(deviations: str) -> str:
    return "max" if float(deviations) == 0 else f"{deviations}σ"


def replace_table(page: str, record: dict) -> str:
    """A page with the table of a record between the markers."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(record) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {"name": "artifact", "entries": []}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
    found = environment(torch.device("cpu"), torch.float32)
    versions = {key: found[key] for key in ("fusedlm", "python", "torch")} | {"numpy": np.__version__}
    for run in arguments.runs:
        for setting in arguments.settings:
            entry = measure(run, setting) | {
                "date": found["date"][:10],
                "device": found["device_name"],
                "versions": versions,
            }
            key = ("recipe", "steps", "setting")
            record["entries"] = [e for e in record["entries"] if any(e[k] != entry[k] for k in key)] + [entry]
            write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")
            print(json.dumps({k: entry[k] for k in (*key, "code_bytes", "file_bytes", "pack_seconds", "read_seconds")}))
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        write_atomic(arguments.page, replace_table(page, record))


if __name__ == "__main__":
    main()
