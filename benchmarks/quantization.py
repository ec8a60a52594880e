"""Bits per byte of a run with its matrices in int8 to int2, by each way to round them.

    python benchmarks/quantization.py RUN --out FILE [--qat BITS=RUN ...] [--bits 8 6 4 3 2] [--only VARIANT ...]
        [--coded BYTES ...] [--tokens N] [--eval-tokens N] [--device cpu] [--note TEXT]
        [--text FILE --text-bytes N --calibration FILE --separator TEXT] [--inputs FILE] [--packed]

Each result is written to FILE at once and is not recomputed. Embeddings and head are in int8; the variant
`embeddings alone` shows what these cost. RUN and the runs of --qat have the same recipe but for train.qat, which is in
the same bits.

Where the prepared text of a run is gone, --text and --calibration name files: the first whole documents of --text that
fit in --text-bytes are scored, and the first --tokens tokens of --calibration are calibrated with. --packed
adds the bytes of the artifact and what the codes take with the entropy coder and with brotli (where it is installed).
--coded quantises for an artifact of so many bytes (`--format coded`).
`scripts/quantization_section.py` writes the table of docs/quantization.md from the records.
"""

import argparse
import copy
import importlib.util
import json
import lzma
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fusedlm.data.training_text import open_training_text
from fusedlm.evaluate import first_tokens, score_documents, text_documents
from fusedlm.files import write_atomic
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.quant.artifact.coders import compress
from fusedlm.quant.artifact.contents import contents
from fusedlm.quant.artifact.table import STATES
from fusedlm.quant.artifact.write import pack
from fusedlm.quant.calibration import Calibration, CalibrationBatch, calibration_batches
from fusedlm.quant.entropy import entropy_bytes
from fusedlm.quant.matrix import Inputs, outcome_bytes
from fusedlm.quant.request import Request, other_bytes
from fusedlm.quant.sequence import quantize_in_order
from fusedlm.quant.targets import named, stages
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
    "plain, 12.85 std": {"calibrate": "plain", "clip": 12.85, "embedding_clip": 20.0},
    "gptq, 12.85 std": {"calibrate": "gptq", "clip": 12.85, "embedding_clip": 20.0},
    "gptq, mixed": {"calibrate": "gptq"},  # of the bytes of gptq
    "qat, plain": {"calibrate": "plain"},
    "qat, gptq": {"calibrate": "gptq"},
}

_SMALLEST_DOCUMENT = 2000  # bytes; shorter ones are not looked for to fill an excerpt


class Target:
    """A run, its text, and what it scores.

    files: what is scored and calibrated with in place of the run's own text. overrides: as `fusedlm.load` has them.
    """

    def __init__(
        self,
        run: Path,
        device: torch.device,
        tokens: int,
        eval_tokens: int | None,
        files: "Files | None" = None,
        overrides: Sequence[str] = (),
    ):
        loaded = load_checkpoint(run, device=device, overrides=overrides)
        self.model, self.recipe = loaded.model, loaded.recipe
        self.device, self.dtype = device, resolve_dtype(loaded.recipe.runtime.dtype, device)
        self.eval_tokens, self.tokenizer, self.kept = eval_tokens, loaded.tokenizer, None
        if files is not None:
            self.documents = files.documents(self.tokenizer)
            self.batches = files.batches(self.tokenizer, tokens, self.recipe.train.seq_len)
            return
        text = open_text(self.recipe, loaded.text, run, remedy="give the run with its prepared text, or --text")
        self.documents = list(text.validation.documents())
        self.batches = calibration_batches(
            text.train,
            open_training_text(text.train, self.recipe),
            n_tokens=tokens,
            seed=0,
            document_mask=self.recipe.data.document_mask,
            device=device,
        )

    def keep_inputs(self, file: Path) -> None:
        """Quantise with inputs of the model as it is, in place of those of the model whose earlier matrices are
        quantised already: read from a file, or measured once and written there."""
        if not file.exists():
            calibration = Calibration(self.model, self.batches, self.device, self.dtype)
            found = stages(self.model)
            every = replace(found[-1], targets=tuple(t for s in found for t in s.targets), last=self.model.head.norm)
            found = {name: [vars(part) for part in parts] for name, parts in calibration.inputs(every).items()}
            kept = {"measured": found, "fisher": calibration.gradients(every.targets)}
            torch.save(kept | {"n_tokens": calibration.n_tokens}, file)
        self.kept = KeptInputs(**torch.load(file, weights_only=True))

    def bpb(self, model) -> float:
        window = self.recipe.train.seq_len
        return score_documents(
            model,
            list(first_tokens(self.documents, self.eval_tokens, self.tokenizer)),
            window=window,
            stride=window,
            device=self.device,
            dtype=self.dtype,
        ).bpb

    def quantized(self, request: Request, *, hidden: bool = True, packed: bool = False) -> dict:
        """Bits per byte and bytes of a request, and its seconds. hidden: with the hidden matrices. packed: with the
        bytes of the artifact."""
        model, started = copy.deepcopy(self.model), time.perf_counter()
        calibration = self.kept or Calibration(model, self.batches, self.device, self.dtype)
        choices, targets = request.choices(model, calibration), named(model)
        choices = {name: c for name, c in choices.items() if hidden or targets[name].kind != "matrix"}
        outcomes = quantize_in_order(model, choices, calibration)
        seconds = time.perf_counter() - started
        n_bytes = sum(map(outcome_bytes, outcomes.values())) + other_bytes(model, outcomes)
        result = {"bpb": self.bpb(model), "tensor_bytes": n_bytes, "seconds": round(seconds, 1)}
        if packed:
            result |= self._packed(model, outcomes)
        return result

    def _packed(self, model, outcomes) -> dict:
        """Bytes of the artifact and of its parts, of the codes with brotli, and bits per weight. Corrections are not in
        an artifact: they count with their factors as they are."""
        matrices = {name: outcome.matrix for name, outcome in outcomes.items()}
        low_rank = sum(outcome.low_rank.nbytes for outcome in outcomes.values() if outcome.low_rank is not None)
        file = pack(contents(model, matrices, torch.float16), self.recipe, self.tokenizer, step=0, text="none")
        codes = sum(entry.bytes for entry in file.header.matrices)
        parts = {part.kind: part.bytes for part in file.header.parts}
        elements = sum(matrix.codes.numel() for matrix in matrices.values())
        result = {
            "file_bytes": len(file.content) + low_rank,
            "code_bytes": codes + parts.get(STATES, 0),
            "entropy_bytes": round(sum(entropy_bytes(matrix.codes) for matrix in matrices.values())),
            "part_bytes": parts | {"header": file.header_bytes},
            "bits_per_weight": round(8 * codes / elements, 4),
        }
        if importlib.util.find_spec("brotli"):
            result["brotli_bytes"] = sum(_brotli(matrix.codes.numpy()) for matrix in matrices.values())
        return result


@dataclass(frozen=True)
class KeptInputs:
    """A `Calibration` that has been measured: inputs and gradients by the name of the parameter."""

    measured: dict
    fisher: dict[str, float]
    n_tokens: int

    def inputs(self, stage, progress=None) -> dict:
        return {target.name: [Inputs(**part) for part in self.measured[target.name]] for target in stage.targets}

    def gradients(self, targets) -> dict[str, float]:
        return {target.name: self.fisher[target.name] for target in targets}


def _brotli(codes: np.ndarray) -> int:
    """Bytes of codes with brotli 11."""
    return len(compress(codes.tobytes(), ("brotli",))["brotli"])


@dataclass(frozen=True)
class Files:
    """Text in files, documents between lines that are the separator.

    text, n_bytes: the first whole documents that together have at most so many bytes are scored; one that is too
        long for what is left is skipped.
    calibration: its first documents are calibrated with.
    """

    text: Path
    n_bytes: int
    calibration: Path
    separator: str

    def documents(self, tokenizer) -> list[tuple[np.ndarray, int]]:
        found, left = [], self.n_bytes
        for document in _read(self.text, self.separator):
            size = len(document.encode())
            if size <= left:
                found += text_documents(document, tokenizer)
                left -= size
            if left < _SMALLEST_DOCUMENT:
                break
        return found

    def batches(self, tokenizer, n_tokens: int, seq_len: int) -> list[CalibrationBatch]:
        """Concatenated documents, cut into sequences."""
        tokens: list[int] = []
        for document in _read(self.calibration, self.separator):
            tokens += [tokenizer.eot_id, *tokenizer.encode(document)]
            if len(tokens) >= n_tokens:
                break
        rows = torch.tensor(tokens[: min(n_tokens, len(tokens)) // seq_len * seq_len]).view(-1, seq_len)
        return [CalibrationBatch(part, None) for part in rows.split(max(1, 4096 // seq_len))]

    def record(self) -> dict:
        return {"text": self.text.name, "text_bytes": self.n_bytes, "calibration": self.calibration.name}


def _read(path: Path, separator: str) -> Iterator[str]:
    """Documents of a text file, of .xz too, without the line ends around them."""
    opened = lzma.open if path.suffix == ".xz" else open
    lines: list[str] = []
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        for line in file:
            if line.strip() != separator:
                lines.append(line)
            elif text := "".join(lines).strip("\n"):
                yield text
                lines = []
    if text := "".join(lines).strip("\n"):
        yield text


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
    parser.add_argument("--dtype", help="of activations (default: that of the run)")
    parser.add_argument("--note", help="a remark for the table")
    parser.add_argument("--coded", nargs="*", type=int, default=[], metavar="BYTES", help="sizes of artifacts to reach")
    parser.add_argument("--packed", action="store_true", help="measure the artifact of each result")
    parser.add_argument("--text", type=Path, help="file to score, in place of what the run held out")
    parser.add_argument("--text-bytes", type=int, default=150_000, help="of its first whole documents")
    parser.add_argument("--calibration", type=Path, help="file to calibrate with, with --text")
    parser.add_argument(
        "--inputs", type=Path, metavar="FILE", help="quantise with the inputs of the float model, kept in FILE: faster"
    )
    parser.add_argument("--separator", default="<|endoftext|>", help="line between the documents of both")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    qat = {int(bits): Path(run) for bits, _, run in (item.partition("=") for item in arguments.qat)}
    settings = {"tokens": arguments.tokens, "eval_tokens": arguments.eval_tokens}
    if arguments.inputs is not None and arguments.qat:
        parser.error("--inputs are of one run; leave out --qat")
    if (arguments.text is None) != (arguments.calibration is None):
        parser.error("--text and --calibration: give both or none")
    files = None
    if arguments.text is not None:
        files = Files(arguments.text, arguments.text_bytes, arguments.calibration, arguments.separator)
        settings |= files.record()
    options = {"packed": arguments.packed}
    dtype = [] if arguments.dtype is None else [f"runtime.dtype={arguments.dtype}"]
    target = Target(arguments.run, device, arguments.tokens, arguments.eval_tokens, files, dtype)
    if arguments.inputs is not None:
        target.keep_inputs(arguments.inputs)
        settings["inputs"] = "of the float model"
    if files is not None:
        settings |= {"documents": len(target.documents), "scored_bytes": sum(n for _, n in target.documents)}
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
    if "embeddings alone" not in results and arguments.bits:
        alone = request_of("gptq", 8, None, arguments.tokens)
        add("embeddings alone", target.quantized(alone, hidden=False, **options))
    for bits in arguments.bits:
        trained = None
        for name in arguments.only:
            key, source, grid = f"int{bits} {name}", target, None
            if name.startswith("qat"):
                if bits not in qat:
                    continue
                trained = trained or Target(qat[bits], device, arguments.tokens, arguments.eval_tokens, files, dtype)
                source, grid = trained, trained.recipe.train.qat
                if grid is None or grid.bits != bits:
                    parser.error(f"--qat {bits}={qat[bits]}: the run was not trained with train.qat.bits={bits}")
                label = "qat" if grid.clip is None else f"qat at {grid.clip:g} std"
                key = key.replace("qat", label)
                if f"int{bits} {label}, float" not in results:
                    add(f"int{bits} {label}, float", {"bpb": trained.bpb(trained.model)})
            budget = results.get(f"int{bits} gptq", {}).get("tensor_bytes")
            if key not in results:
                add(key, source.quantized(request_of(name, bits, budget, arguments.tokens, grid), **options))
    for n_bytes in arguments.coded:
        key = f"coded {n_bytes}"
        if key not in results:
            request = Request("coded", calibrate="gptq", budget=n_bytes, tokens=arguments.tokens)
            add(key, target.quantized(request, **options))


if __name__ == "__main__":
    main()
