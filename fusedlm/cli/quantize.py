"""fusedlm quantize: a trained run with its weights in few bits."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    RunArgument,
    WeightsOption,
    integer,
    load_run,
    number,
    progress_bars,
)
from fusedlm.cli.eval import DataOption, StrideOption, TextOption, WindowOption
from fusedlm.cli.quantize_run import described, quantized, request_of, row_of
from fusedlm.cli.text import documents_of
from fusedlm.strict_json import dumps


def quantize(
    run: RunArgument,
    format: Annotated[
        str,
        typer.Option(metavar="mxfp4|int4|fp8|int8|int2..int8|mixed|coded", help="Format of hidden matrices."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the quantised run.", show_default=False)],
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="packed|integers",
            help="packed: layers and experts compute with codes; integers: embeddings and head too, decoded when "
            "loaded (default: packed for mxfp4, int4, fp8 and int8).",
            show_default=False,
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Elements that share a scale (default: a row; packed int4: 64, or 32 or 128).",
            show_default=False,
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            metavar="none|int2..int8",
            help="Format of embeddings and head, of integers (default: int8).",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="plain|gptq-lite|gptq",
            help="Round each element by itself; with scales searched on training text; or with compensation.",
        ),
    ] = "plain",
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="max|search|K",
            help="Scales by the largest element, by search, or K standard deviations (default: search, plain: max).",
            show_default=False,
        ),
    ] = None,
    embedding_clip: Annotated[
        str | None,
        typer.Option(metavar="max|search|K", help="The same of embeddings and head.", show_default=False),
    ] = None,
    order: Annotated[
        bool, typer.Option("--order/--no-order", help="gptq: columns with the largest inputs first.")
    ] = True,
    damping: Annotated[
        float, typer.Option(parser=number, metavar="D", help="gptq: of the mean of the Hessian's diagonal.")
    ] = 0.01,
    rank: Annotated[int, typer.Option(parser=integer, metavar="R", help="Rank of low-rank corrections; 0: none.")] = 0,
    corrected: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Matrices with a correction, without a budget (default: 3).",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="BYTES",
            help="Most bytes of all tensors: format mixed gives each matrix a width of its own, coded a step for codes "
            "that are entropy-coded.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="N",
            help="Tokens of training text to calibrate with (default: 131072).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(parser=integer, help="Seed of their choice (default: 0).", show_default=False),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="Score text before and after, as fusedlm eval does.")
    ] = True,
    text: TextOption = None,
    data: DataOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Round the matrices of RUN to few bits and write them as a run that eval and generate read. Norms, routers,
    convolutions and vectors stay as they are."""
    from fusedlm.nn.quantized import replace_layers
    from fusedlm.quant.request import other_bytes
    from fusedlm.quant.run import check_out, write_quantized
    from fusedlm.quant.targets import named
    from fusedlm.quant.unfinished import remove_unfinished
    from fusedlm.runs.checkpoint import Checkpoints
    from fusedlm.runs.folder import CHECKPOINTS
    from fusedlm.runs.quantization import is_quantized
    from fusedlm.runs.state import MODEL

    only_calibrated = {"corrected": corrected, "tokens": tokens, "seed": seed}
    request = request_of(
        format=format, storage=storage, group=group, embedding=embedding, calibrate=calibrate, clip=clip,
        embedding_clip=embedding_clip, ordered=order, damping=damping, rank=rank, budget=budget, **only_calibrated,
    )  # fmt: skip
    read = {"text": text, "window": window, "stride": stride} | ({"data": data} if calibrate == "plain" else {})
    if not score and (useless := [name for name, value in read.items() if value is not None]):
        raise ValueError(f"--{useless[0]}: only for scoring; leave out --no-score")
    if text is not None and read.get("data") is not None:
        raise ValueError(f"--text {text} and --data {data}: give only one of them")
    check_out(out)
    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=None)
    checkpoints = Checkpoints(run / CHECKPOINTS)
    if is_quantized(checkpoints, loaded.step):
        raise ValueError(f"{run} is quantised already; quantise the run that it is from")
    files = checkpoints.files(loaded.step)
    source = [files[name] for name in checkpoints.table_files(loaded.step, MODEL)]
    identity = {"source": " ".join(file["sha256"] for file in source), "weights": weights}
    reader = loaded if data is None else replace(loaded, recipe=_with_data(loaded.recipe, data))
    with progress_bars() as progress:
        scored = _Scoring(reader, text, window, stride, progress) if score else None
        before = scored and scored.run("before")
        outcomes = quantized(request, reader, out, identity, progress)
        left_bytes = other_bytes(loaded.model, outcomes)
        experts = [name.removesuffix(".weight") for name, target in named(loaded.model).items() if target.is_expert]
        if request.is_packed:
            layers = {name.removesuffix(".weight"): outcome.matrix for name, outcome in outcomes.items()}
            replace_layers(loaded.model, layers)
        after = scored and scored.run("after")
    written = write_quantized(
        out, loaded.model, loaded.tokenizer, loaded.recipe,
        step=loaded.step, text=loaded.text, device=loaded.device, dtype=loaded.dtype,
        matrices=None if request.is_packed else outcomes,
    )  # fmt: skip
    remove_unfinished(out)
    coded = format == "coded"
    if coded:
        left_bytes //= 2  # float16, as fusedlm pack stores them
    rows = [row_of(name, outcome, coded=coded) for name, outcome in outcomes.items()]
    elements, n_bytes = (sum(row[key] for row in rows) for key in ("elements", "bytes"))
    result = {
        "format": format,
        "storage": "packed" if request.is_packed else "integers",
        "group": request.group_size,
        "calibrate": calibrate,
        "matrices": rows,
        "layers": len(rows),
        "quantized_weights": elements,
        "bits_per_weight": 8 * n_bytes / max(elements, 1),
        "expert_weights": sum(row["elements"] for row in rows if row["name"] in experts),
        "expert_bytes": sum(row["bytes"] for row in rows if row["name"] in experts),
        "tensor_bytes": n_bytes + left_bytes,
        "budget": budget,
        "bytes_before": sum(file["bytes"] for file in source),
        "bytes_after": written.stat().st_size,
        "bpb_before": before,
        "bpb_after": after,
        "checkpoint": loaded.step,
        "weights": weights,
    }
    print(dumps(result) if as_json else described(result, out))


def _with_data(recipe, data: Path):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(data)})})


class _Scoring:
    """The same text, scored as often as it runs."""

    def __init__(self, loaded, text: Path | None, window, stride, progress):
        from fusedlm.evaluate import default_stride

        self._loaded, self._text, self._progress = loaded, text, progress
        window = loaded.recipe.train.seq_len if window is None else window
        self._spans = {
            "window": window or None,
            "stride": default_stride(window) if window and stride is None else stride,
        }

    def run(self, when: str) -> float:
        """Bits per byte."""
        from fusedlm.evaluate import score_documents

        documents, n_tokens, longest = documents_of(self._text, self._loaded, self._progress)
        return score_documents(
            self._loaded.model,
            documents,
            **self._spans,
            longest=longest,
            device=self._loaded.device,
            dtype=self._loaded.dtype,
            progress=lambda done: self._progress(f"scoring {when}", done, n_tokens),
        ).bpb
