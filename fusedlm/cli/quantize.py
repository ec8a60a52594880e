"""fusedlm quantize: a trained run with its weights in few bits."""

import json
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
    progress_bars,
)
from fusedlm.cli.eval import DataOption, StrideOption, TextOption, WindowOption
from fusedlm.cli.text import documents_of


def quantize(
    run: RunArgument,
    format: Annotated[str, typer.Option(metavar="mxfp4|int4|fp8|int8", help="Format of the weights.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the quantised run.", show_default=False)],
    group: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="32|64|128",
            help="Elements of int4 that share a scale (default: 64).",
            show_default=False,
        ),
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
    """Round the hidden matrices of RUN to few bits, each element by itself, and write them as a run that eval and
    generate read. Embeddings, head, norms, routers and stacks of experts stay as they are."""
    from fusedlm.nn.module import parameters_by_kind
    from fusedlm.nn.quantized import quantized_layers, replace_layers
    from fusedlm.ops.quantized.reference import group_of
    from fusedlm.quant.rounding import round_weights
    from fusedlm.quant.run import check_out, write_quantized
    from fusedlm.runs.checkpoint import Checkpoints
    from fusedlm.runs.folder import CHECKPOINTS
    from fusedlm.runs.state import MODEL

    _check(format, group, group_of)
    given = {"--text": text, "--data": data, "--window": window, "--stride": stride}
    if not score and (useless := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"{useless[0]}: only for scoring; leave out --no-score")
    if text is not None and data is not None:
        raise ValueError(f"--text {text} and --data {data}: give only one of them")
    check_out(out)
    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=None)
    if quantized_layers(loaded.model):
        raise ValueError(f"{run} is quantised already; quantise the run that it is from")
    with progress_bars() as progress:
        scored = _Scoring(loaded, text, data, window, stride, progress) if score else None
        before = scored and scored.run("before")
        replace_layers(loaded.model, round_weights(loaded.model, format, group))
        after = scored and scored.run("after")
    written = write_quantized(
        out, loaded.model, loaded.tokenizer, loaded.recipe,
        step=loaded.step, text=loaded.text, device=loaded.device, dtype=loaded.dtype,
    )  # fmt: skip
    layers = quantized_layers(loaded.model).values()
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    n_bytes = sum(layer.quantized_weight().nbytes for layer in layers)
    source = Checkpoints(run / CHECKPOINTS).path(loaded.step) / f"{MODEL}.safetensors"
    result = {
        "format": format,
        "group": group_of(format, group) or None,
        "layers": len(layers),
        "quantized_weights": elements,
        "bits_per_weight": 8 * n_bytes / max(elements, 1),
        "matrices_left": sum(p.numel() for _, kind, p in parameters_by_kind(loaded.model) if kind == "matrix"),
        "bytes_before": source.stat().st_size,
        "bytes_after": written.stat().st_size,
        "bpb_before": before,
        "bpb_after": after,
        "checkpoint": loaded.step,
        "weights": weights,
    }
    print(json.dumps(result) if as_json else _described(result, out))


def _check(format: str, group: int | None, group_of) -> None:
    try:
        group_of(format, group)
    except ValueError as error:
        raise ValueError(f"--{str(error).replace('=', ' ', 1)}") from None


class _Scoring:
    """The same text, scored as often as it runs."""

    def __init__(self, loaded, text: Path | None, data: Path | None, window, stride, progress):
        from fusedlm.evaluate import default_stride

        if data is not None:
            recipe = loaded.recipe
            recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(data)})})
            loaded = replace(loaded, recipe=recipe)
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


def _described(result: dict, out: Path) -> str:
    from fusedlm.report.units import count, size

    group = f" in groups of {result['group']}" if result["format"] == "int4" else ""
    lines = [
        f"{result['layers']} layers, {count(result['quantized_weights'])} weights: {result['format']}{group}, "
        f"{result['bits_per_weight']:.3g} bits per weight",
        f"model on disk: {size(result['bytes_before'])} before, {size(result['bytes_after'])} after",
    ]
    if result["matrices_left"]:
        lines.insert(1, f"{count(result['matrices_left'])} weights of experts stay in float32")
    if result["bpb_before"] is not None:
        lines.append(f"bits per byte: {result['bpb_before']:.4f} before, {result['bpb_after']:.4f} after")
    return "\n".join([*lines, f"next: fusedlm eval {out}"])
