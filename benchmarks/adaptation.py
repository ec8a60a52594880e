"""Score text with a trained run plainly and with each method of adaptation.

    python benchmarks/adaptation.py RUN [--text FILE] [--tokens N] [--window N] [--stride N] [--methods ngram tilt ...]
        [--device cpu] [--out FILE]

Text is what the run held out, or a file as one document; of it the first N tokens. Rows of other texts that FILE holds
already are kept.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedlm.data.text_files import read_text_file  # noqa: E402
from fusedlm.evaluate import default_stride, first_tokens, text_documents  # noqa: E402
from fusedlm.evaluate.adapt import Finetune, HintTilt, NgramMixture, score_adapted  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs import load_checkpoint  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402
from fusedlm.runs.text import open_text  # noqa: E402

METHODS = {
    "ngram": NgramMixture(),
    "tilt": HintTilt(),
    "norms": Finetune(),
    "norms-fast": Finetune(lr=1e-2),
    "low-rank": Finetune("low_rank", lr=1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    loaded = load_checkpoint(arguments.run, device=device)
    dtype = resolve_dtype(loaded.recipe.runtime.dtype, device)
    window = arguments.window or loaded.recipe.train.seq_len
    stride = arguments.stride or default_stride(window)
    documents = list(first_tokens(_documents(arguments, loaded), arguments.tokens, loaded.tokenizer))
    machine = environment(device, dtype)
    record = {
        "name": loaded.recipe.name,
        "date": machine["date"][:10],
        "device": machine["device_name"],
        "versions": {name: machine[name] for name in ("fusedlm", "python", "torch", "triton", "git_commit")},
        "threads": torch.get_num_threads(),
        "rows": [],
    }
    text = arguments.text.name if arguments.text else "held-out"
    if arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        record["rows"] = [row for row in before["rows"] if row["text"] != text]
    for name in arguments.methods:
        method = METHODS[name]
        found = score_adapted(loaded.model, documents, method, window=window, stride=stride, device=device, dtype=dtype)
        sizes = {"tokens": found.plain.tokens, "bytes": found.plain.bytes, "documents": found.plain.documents}
        command = shlex.join(["python", "benchmarks/adaptation.py", *sys.argv[1:]])
        row = {"text": text, "command": command, "window": window, "stride": stride}
        record["rows"].append(row | {"vocab_size": loaded.model.vocab_size} | sizes | found.record(method))
        gain = found.gain
        print(f"{text:16} {name:10} {found.plain.bpb:.4f} -> {found.adapted.bpb:.4f}", gain, flush=True)
        if arguments.out:  # so that a run that is stopped leaves a record
            write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def _documents(arguments, loaded):
    if arguments.text:
        return text_documents(read_text_file(arguments.text), loaded.tokenizer)
    text = open_text(loaded.recipe, loaded.text, arguments.run, remedy="give --text FILE", progress=lambda *_: None)
    return text.validation.documents()


if __name__ == "__main__":
    main()
