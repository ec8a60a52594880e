"""What fusedlm golf does with a trained run: score, quantise, pack, and score the file."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusedlm.cli.common import LoadedRun, ReportProgress, load_run
from fusedlm.cli.quantize_run import calibration_of
from fusedlm.cli.text import documents_of
from fusedlm.strict_json import dumps

if TYPE_CHECKING:
    from fusedlm.quant.artifact.write import Packed
    from fusedlm.quant.request import Request

RUN, MODEL, CODE, RECORD, REPORT = "run", "model.flm", "code.tar.xz", "golf.json", "golf.md"


@dataclass(frozen=True)
class Options:
    """limit: bytes of the artifact. tokens: of calibration. stride: of the sliding windows. eval_tokens: held-out
    tokens that are scored; None: all. weights: raw, ema or swa. with_code: the code counts in the limit."""

    limit: int
    tokens: int
    stride: int
    eval_tokens: int | None
    weights: str
    with_code: bool

    def __post_init__(self):
        for option, value in (("bytes", self.limit), ("tokens", self.tokens), ("stride", self.stride)):
            if value < 1:
                raise ValueError(f"--{option} {value}: must be at least 1")
        if self.eval_tokens is not None and self.eval_tokens < 1:
            raise ValueError(f"--eval-tokens {self.eval_tokens}: must be at least 1")


def golfed(out: Path, options: Options, progress: ReportProgress) -> dict:
    """Quantise and pack the run in a folder, score run and artifact, and write all files.

    Returns:
        The record, as it is in golf.json.

    Raises:
        OverBudget: the file would be larger than the limit; none is written.
        ValueError: the run or its text cannot be used.
    """
    from fusedlm.files import write_atomic
    from fusedlm.model.accounting import count_parameters
    from fusedlm.quant.artifact.budget import break_down
    from fusedlm.quant.artifact.standalone import code_archive
    from fusedlm.runs.hardware import environment

    run, started = out / RUN, time.perf_counter()
    loaded = load_run(run, checkpoint="last", weights=options.weights, device="auto", overrides=None)
    spans = _spans(loaded, options.stride)
    before = _score(loaded, spans["plain"], options.eval_tokens, "before", progress)
    scored = time.perf_counter()
    packed, sizes = _packed(loaded, options, progress)
    archive = code_archive(packed.content)
    write_atomic(out / MODEL, packed.content)
    write_atomic(out / CODE, archive)
    quantised = time.perf_counter()
    artifact = load_run(out / MODEL, checkpoint="last", weights="raw", device="auto", overrides=None, files=True)
    scores = {
        name: _score(artifact, own, options.eval_tokens, f"{name} windows", progress) for name, own in spans.items()
    }
    elements = sum(matrix.n_elements for matrix in packed.header.matrices)
    record = break_down(packed.header, packed.header_bytes).record() | {
        "recipe": loaded.recipe.name,
        "step": loaded.step,
        "weights": options.weights,
        "parameters": count_parameters(loaded.model).total,
        "limit": options.limit,
        "code_bytes": len(archive),
        "code_counts": options.with_code,
        "bits_per_weight": 8 * sum(matrix.bytes for matrix in packed.header.matrices) / max(elements, 1),
        "files_tried": sizes,
        "calibration_tokens": options.tokens,
        "float": before,
        **scores,
        "seconds": {
            "score before": round(scored - started, 1),
            "quantise and pack": round(quantised - scored, 1),
            "score": round(time.perf_counter() - quantised, 1),
        },
        "environment": environment(loaded.device, loaded.dtype),
    }
    write_atomic(out / RECORD, dumps(record, indent=1) + "\n")
    return record


def _spans(loaded: LoadedRun, stride: int) -> dict[str, dict]:
    """Windows that do not overlap, as in the validation of training, and sliding ones."""
    window = loaded.recipe.train.seq_len
    return {
        "plain": {"window": window, "stride": window},
        "sliding": {"window": window, "stride": min(stride, window)},
    }


def _score(loaded: LoadedRun, spans: dict, eval_tokens: int | None, note: str, progress: ReportProgress) -> dict:
    """Bits per byte of what the run held out."""
    from fusedlm.evaluate import first_tokens, score_documents

    documents, n_tokens, longest = documents_of(None, loaded, progress)
    n_tokens = min(n_tokens, eval_tokens or n_tokens)
    score = score_documents(
        loaded.model,
        first_tokens(documents, eval_tokens, loaded.tokenizer),
        **spans,
        longest=longest,
        device=loaded.device,
        dtype=loaded.dtype,
        progress=lambda done: progress(f"scoring, {note}", done, n_tokens),
    )
    return {"bpb": score.bpb, "tokens": score.tokens, "bytes": score.bytes, **spans}


def _packed(loaded: LoadedRun, options: Options, progress: ReportProgress) -> tuple["Packed", list[int]]:
    """The artifact, and the bytes of all that were tried.

    Of a run with quantisation-aware training the weights are rounded on its grid; of others the limit chooses.
    """
    import torch

    from fusedlm.quant.artifact.budget import OverBudget, break_down
    from fusedlm.quant.artifact.contents import contents
    from fusedlm.quant.artifact.standalone import code_archive
    from fusedlm.quant.artifact.write import pack
    from fusedlm.quant.fit import fit_artifact
    from fusedlm.quant.request import Request, other_bytes
    from fusedlm.quant.sequence import quantize_in_order

    def build(matrices) -> "Packed":
        return pack(
            contents(loaded.model, matrices, torch.float16),
            loaded.recipe,
            loaded.tokenizer,
            step=loaded.step,
            text=loaded.text,
            weights=options.weights,
            progress=lambda done, total: progress("packing", done, total),
        )

    code_sizes: list[int] = []

    def code(packed: "Packed") -> int:
        """Bytes of the code that count. Which modules it has depends on the model, not on its weights."""
        if options.with_code and not code_sizes:
            code_sizes.append(len(code_archive(packed.content)))
        return sum(code_sizes)

    if loaded.recipe.train.qat is not None:
        outcomes = quantize_in_order(loaded.model, grid_of(loaded.recipe.train.qat).choices(loaded.model, None))
        packed = build({name: outcome.matrix for name, outcome in outcomes.items()})
        size = len(packed.content) + code(packed)
        if size > options.limit:
            raise OverBudget(break_down(packed.header, packed.header_bytes), options.limit, code(packed))
        return packed, [size]
    request = Request("coded", calibrate="gptq", budget=options.limit, tokens=options.tokens)
    calibration = calibration_of(request, loaded, progress)
    estimates = request.coded_estimates(loaded.model, calibration, progress)
    others = other_bytes(loaded.model, estimates) // 2  # float16
    fitted = fit_artifact(
        loaded.model, estimates, calibration, build, options.limit, others=others, code=code, progress=progress
    )
    return fitted.packed, fitted.sizes


def grid_of(qat) -> "Request":
    """The rounding of `train.qat`."""
    from fusedlm.quant.request import Request

    return Request(
        f"int{qat.bits}",
        storage="integers",
        group=qat.group,
        embedding=None if qat.embedding_bits is None else f"int{qat.embedding_bits}",
        clip=qat.clip or "max",
        embedding_clip=qat.embedding_clip or "max",
    )


def report_lines(record: dict) -> list[str]:
    """The result, for people."""
    total = record["bytes"] + record["code_bytes"]
    windows = "window {window:,}, stride {stride:,}".format
    return [
        f"{record['recipe']}: {record['parameters'] / 1e6:.2f} million parameters, step {record['step']:,}, "
        f"{record['weights']} weights",
        f"file: {record['bytes']:,} of {record['limit']:,} bytes, {record['bits_per_weight']:.3f} bits per weight",
        f"with the code of a reader, {record['code_bytes']:,} bytes: {total:,}",
        f"before: {record['float']['bpb']:.4f} bits per byte ({windows(**record['float'])})",
        f"packed: {record['plain']['bpb']:.4f} bits per byte ({windows(**record['plain'])}), "
        f"{record['plain']['bpb'] - record['float']['bpb']:+.4f}",
        f"packed: {record['sliding']['bpb']:.4f} bits per byte ({windows(**record['sliding'])})",
        f"{record['plain']['bytes']:,} held-out bytes, {record['plain']['tokens']:,} tokens",
    ]
