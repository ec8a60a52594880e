"""Decoding of a run and of the same run in few bits: tokens per second, bytes of the weights, and bits per byte.

    python benchmarks/quantized_decoding.py RUN [QUANTISED ...] [--batches 1 16] [--eval-tokens N] [--out FILE]

The runs of `fusedlm quantize RUN` follow the one that they were made of. Prompts are passages of its validation text;
steps are those of `fusedlm.generate`, on a GPU one CUDA graph each. A first pass compiles and captures; times are the
fastest of the passes after it, from the first token to the last. Bits per byte are of the first tokens of the
validation text, in windows of the length that the run was trained with.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speculation import measure, passages  # noqa: E402
from fusedlm.evaluate import first_tokens, score_documents  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.generation.steps import Predictor  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.nn.quantized import quantized_weights  # noqa: E402
from fusedlm.runs.folder import require_run  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402
from fusedlm.runs.load import load_checkpoint  # noqa: E402
from fusedlm.runs.text import open_text  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="generated per row")
    parser.add_argument("--passes", type=int, default=3, help="timed")
    parser.add_argument("--eval-tokens", type=int, default=262144, help="scored")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    record = {"name": "quantized decoding"}
    record["command"] = shlex.join(["python", "benchmarks/quantized_decoding.py", *sys.argv[1:]])
    record |= {"prompt_tokens": arguments.prompt, "tokens": arguments.tokens, "environment": environment(device, dtype)}
    record["rows"] = []
    documents = prompts = None
    try:
        for run in arguments.runs:
            require_run(run)
    except ValueError as error:
        parser.error(str(error))
    for run in arguments.runs:
        try:
            loaded = load_checkpoint(run, device=device)
            if documents is None:
                record["recipe"] = loaded.recipe.name
                remedy = "give the run with its prepared text"
                text = open_text(loaded.recipe, loaded.text, run, remedy=remedy).validation
                documents = list(first_tokens(text.documents(), arguments.eval_tokens, loaded.tokenizer))
                prompts = passages(loaded.recipe, max(arguments.batches), arguments.prompt)
        except ValueError as error:
            parser.error(str(error))
        row = {"run": run.name, "format": _format(loaded.model), "weight_bytes": _weight_bytes(loaded.model, dtype)}
        window = loaded.recipe.train.seq_len
        score = score_documents(loaded.model, documents, window=window, device=device, dtype=dtype)
        row["bits_per_byte"] = score.bpb
        predictor = Predictor(loaded.model, None, device, dtype)
        row["decoding"] = {}
        for batch in arguments.batches:
            found = measure(predictor, prompts[:batch], 0, 0.0, arguments.tokens, arguments.passes)
            row["decoding"][batch] = {key: found[key] for key in ("tokens_per_second", "seconds", "graph")}
        record["rows"].append(row)
        print(_line(row, record["rows"][0]), flush=True)
        if arguments.out:  # so that a run that is stopped leaves a record
            write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")
        del predictor, loaded
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _format(model: torch.nn.Module) -> str | None:
    return next((weight.format for weight in quantized_weights(model).values()), None)


def _weight_bytes(model: torch.nn.Module, dtype: torch.dtype) -> int:
    """Of codes with their scales, and of the parameters in the dtype of the steps."""
    codes = sum(weight.nbytes for weight in quantized_weights(model).values())
    return codes + sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _line(row: dict, plain: dict) -> str:
    text = f"{row['format'] or 'floats'}: {row['bits_per_byte']:.4f} bits per byte, {row['weight_bytes'] / 1e6:,.0f} MB"
    for batch, found in row["decoding"].items():
        rate = found["tokens_per_second"]
        text += f"; {batch} rows: {rate:,.0f} tokens/s ({rate / plain['decoding'][batch]['tokens_per_second']:.2f}x)"
    return text


if __name__ == "__main__":
    main()
