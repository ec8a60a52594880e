"""Bits per byte of a run with its matrices in int8 to int2, by each way to round them.

    python benchmarks/quantization.py RUN --out FILE [--qat BITS=RUN ...] [--bits 8 6 4 3 2] [--only VARIANT ...]
        [--tokens N] [--eval-tokens N] [--device cpu] [--note TEXT]

Each result is written to FILE at once and is not recomputed. Embeddings and head are in int8; the variant
`embeddings alone` shows what these cost. RUN and the runs of --qat have the same recipe but for train.qat, which is in
the same bits.
`scripts/quantization_section.py` writes the table of docs/quantization.md from the records.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch

from fusedlm.data.training_text import open_training_text
from fusedlm.evaluate import first_tokens, score_documents
from fusedlm.files import write_atomic
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.quant.calibration import Calibration, calibration_batches
from fusedlm.quant.matrix import outcome_bytes
from fusedlm.quant.request import Request, other_bytes
from fusedlm.quant.sequence import quantize_in_order
from fusedlm.quant.targets import named
from fusedlm.runs.hardware import environment
from fusedlm.runs.load import load_checkpoint
from fusedlm.runs.text import open_text

VARIANTS = {
    "plain": {"calibrate": "plain"},
    "gptq-lite": {"calibrate": "gptq-lite"},
    "gptq": {"calibrate": "gptq"},
    "gptq, no order": {"calibrate": "gptq", "ordered": False},
    "gptq, no clip search": {"calibrate": "gptq", "clip": "max"},
    "gptq, groups of 32": {"calibrate": "gptq", "group": 32},
    "gptq, correction": {"calibrate": "gptq", "rank": 4, "corrected": 3},
    "gptq, mixed": {"calibrate": "gptq"},  # of the bytes of gptq
    "qat, plain": {"calibrate": "plain"},
    "qat, gptq": {"calibrate": "gptq"},
}


class Target:
    """A run, its text, and what it scores."""

    def __init__(self, run: Path, device: torch.device, tokens: int, eval_tokens: int | None):
        loaded = load_checkpoint(run, device=device)
        self.model, self.recipe = loaded.model, loaded.recipe
        self.device, self.dtype = device, resolve_dtype(loaded.recipe.runtime.dtype, device)
        text = open_text(self.recipe, loaded.text, run, remedy="give the run with its prepared text")
        self.validation, self.eval_tokens, self.tokenizer = text.validation, eval_tokens, loaded.tokenizer
        self.batches = calibration_batches(
            text.train,
            open_training_text(text.train, self.recipe),
            n_tokens=tokens,
            seed=0,
            document_mask=self.recipe.data.document_mask,
            device=device,
        )

    def bpb(self, model) -> float:
        window = self.recipe.train.seq_len
        return score_documents(
            model,
            first_tokens(self.validation.documents(), self.eval_tokens, self.tokenizer),
            window=window,
            stride=window,
            longest=self.validation.longest,
            device=self.device,
            dtype=self.dtype,
        ).bpb

    def quantized(self, request: Request, *, hidden: bool = True) -> dict:
        """Bits per byte and bytes of a request, and its seconds. hidden: with the hidden matrices."""
        model, started = copy.deepcopy(self.model), time.perf_counter()
        calibration = Calibration(model, self.batches, self.device, self.dtype)
        choices, targets = request.choices(model, calibration), named(model)
        choices = {name: c for name, c in choices.items() if hidden or targets[name].kind != "matrix"}
        outcomes = quantize_in_order(model, choices, calibration)
        seconds = time.perf_counter() - started
        n_bytes = sum(map(outcome_bytes, outcomes.values())) + other_bytes(model, outcomes)
        return {"bpb": self.bpb(model), "tensor_bytes": n_bytes, "seconds": seconds}


def request_of(name: str, bits: int, budget: int | None, tokens: int, qat=None) -> Request:
    """The request of a variant; of mixed widths, with the bytes of another one; after training with `qat`, on its
    grid."""
    options = {"storage": "integers", "tokens": tokens, **VARIANTS[name]}
    if qat is not None:
        options |= {"clip": qat.clip or "max", "embedding_clip": qat.embedding_clip or "max", "group": qat.group}
    if name.endswith("mixed"):
        return Request("mixed", budget=budget, **options)
    return Request(f"int{bits}", embedding="int8", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--qat", nargs="*", default=[], metavar="BITS=RUN", help="runs with train.qat in so many bits")
    parser.add_argument("--bits", nargs="*", type=int, default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="of the variants")
    parser.add_argument("--tokens", type=int, default=131072, help="of calibration")
    parser.add_argument("--eval-tokens", type=int, help="held-out tokens that are scored (default: all)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--note", help="a remark for the table")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    qat = {int(bits): Path(run) for bits, _, run in (item.partition("=") for item in arguments.qat)}
    settings = {"tokens": arguments.tokens, "eval_tokens": arguments.eval_tokens}
    target = Target(arguments.run, device, arguments.tokens, arguments.eval_tokens)
    record = {"name": target.recipe.name, "settings": settings, "results": {}}
    if arguments.out.exists():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
        if record["name"] != target.recipe.name or record["settings"] != settings:
            parser.error(f"{arguments.out} holds results of {record['name']} with {record['settings']}")
    record["environment"] = environment(device, target.dtype)
    record["note"] = arguments.note
    results = record["results"]

    def add(key: str, result: dict) -> None:
        results[key] = result
        print(f"{key}: {result}", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")

    if "float" not in results:
        add("float", {"bpb": target.bpb(target.model)})
    if "embeddings alone" not in results:
        add("embeddings alone", target.quantized(request_of("gptq", 8, None, arguments.tokens), hidden=False))
    for bits in arguments.bits:
        trained = None
        for name in arguments.only:
            key, source, grid = f"int{bits} {name}", target, None
            if name.startswith("qat"):
                if bits not in qat:
                    continue
                trained = trained or Target(qat[bits], device, arguments.tokens, arguments.eval_tokens)
                source, grid = trained, trained.recipe.train.qat
                if grid is None or grid.bits != bits:
                    parser.error(f"--qat {bits}={qat[bits]}: the run was not trained with train.qat.bits={bits}")
                label = "qat" if grid.clip is None else f"qat at {grid.clip:g} std"
                key = key.replace("qat", label)
                if f"int{bits} {label}, float" not in results:
                    add(f"int{bits} {label}, float", {"bpb": trained.bpb(trained.model)})
            budget = results.get(f"int{bits} gptq", {}).get("tensor_bytes")
            if key not in results:
                add(key, source.quantized(request_of(name, bits, budget, arguments.tokens, grid)))


if __name__ == "__main__":
    main()
