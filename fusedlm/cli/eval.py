"""fusedlm eval: bits per byte of a trained model on validation text, probes, and benchmark tasks."""

from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.adapt_options import (
    AdaptChunkOption,
    AdaptLearningRateOption,
    AdaptOption,
    AdaptParametersOption,
    AdaptRankOption,
    AdaptResetOption,
    AdaptStepsOption,
    adaptation,
    describe_gain,
)
from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    ModelArgument,
    RuntimeArgument,
    WeightsOption,
    YaRNOption,
    integer,
    load_run,
    progress_bars,
    stretch,
)
from fusedlm.cli.probe_options import (
    DepthsOption,
    FactorsOption,
    LearningRateOption,
    LengthsOption,
    OutOption,
    PairsOption,
    ProbeOption,
    SamplesOption,
    SeedOption,
    StepsOption,
    check_options,
)
from fusedlm.cli.probes import Target, run_probe
from fusedlm.cli.tasks import LimitOption, ShotsOption, TasksOption, check_task_options, run_tasks
from fusedlm.cli.text import documents_of
from fusedlm.strict_json import dumps

TextOption = Annotated[
    Path | None,
    typer.Option(help="Text file to score as one document (default: what the run held out).", show_default=False),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder with the prepared text of the run (default: data.dir of its recipe).",
        show_default=False,
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        "--context",
        parser=integer,
        metavar="N",
        help="Most tokens of context per prediction; 0: the full document (default: train.seq_len).",
        show_default=False,
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        parser=integer,
        metavar="N",
        help="Tokens from one window to the next (default: half the window).",
        show_default=False,
    ),
]
AcrossOption = Annotated[
    bool,
    typer.Option("--across-documents", help="Slide the window over the text as one sequence, across end-of-text."),
]


def evaluate(
    run: ModelArgument,
    overrides: RuntimeArgument = None,
    text: TextOption = None,
    data: DataOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    across_documents: AcrossOption = False,
    adapt: AdaptOption = None,
    adapt_parameters: AdaptParametersOption = None,
    adapt_rank: AdaptRankOption = None,
    adapt_lr: AdaptLearningRateOption = None,
    adapt_chunk: AdaptChunkOption = None,
    adapt_steps: AdaptStepsOption = None,
    adapt_reset: AdaptResetOption = False,
    yarn: YaRNOption = None,
    probe: ProbeOption = None,
    steps: StepsOption = None,
    lr: LearningRateOption = None,
    samples: SamplesOption = None,
    seed: SeedOption = None,
    pairs: PairsOption = None,
    lengths: LengthsOption = None,
    depths: DepthsOption = None,
    factors: FactorsOption = None,
    out: OutOption = None,
    tasks: TasksOption = None,
    shots: ShotsOption = None,
    limit: LimitOption = None,
    qat: Annotated[bool, typer.Option("--qat", help="Score the weights as train.qat of the run rounds them.")] = False,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Score validation text with the model of RUN, each token once, and print bits per byte; or run probes or tasks."""
    options = {"text": text, "data": data, "window": window, "stride": stride, "yarn": yarn, "steps": steps, "lr": lr}
    options |= {"samples": samples, "seed": seed, "pairs": pairs, "lengths": lengths, "depths": depths}
    tuned = {"parameters": adapt_parameters, "rank": adapt_rank, "lr": adapt_lr, "chunk": adapt_chunk}
    tuned |= {"steps": adapt_steps, "reset": adapt_reset or None}
    options |= {"adapt": adapt, "across-documents": across_documents or None}
    options |= {f"adapt-{name}": value for name, value in tuned.items()}
    options |= {"factors": factors, "out": out, "qat": qat or None}
    check_task_options(tasks, shots, limit, options | {"probe": probe})
    if tasks is not None:
        loaded = load_run(
            run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides, files=True
        )
        stretch(loaded.model, loaded.recipe, yarn)
        run_tasks(loaded, tasks, shots, limit, window, weights, yarn, as_json=as_json)
        return
    options = check_options(probe, options)
    if text is not None and data is not None and probe != "needle":  # which can be finetuned on the run's own text
        raise ValueError(f"--text {text} and --data {data}: give only one of them")
    if probe is not None:
        run_probe(probe, Target(run, checkpoint, weights, device, overrides or []), options, as_json=as_json)
        return
    from fusedlm.evaluate import default_stride, score_documents
    from fusedlm.evaluate.adapt import score_adapted

    method = adaptation(adapt, tuned)
    loaded = load_run(
        run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides, data=data, files=True
    )
    stretch(loaded.model, loaded.recipe, yarn)
    if qat:
        _round(loaded)
    if window is None:
        window = loaded.recipe.train.seq_len
    if window and stride is None:
        stride = default_stride(window)
    if not window and (useless := "--adapt" if method else "--across-documents" if across_documents else None):
        raise ValueError(f"{useless}: needs a window; --window 0 scores each document in full")
    with progress_bars() as progress:
        documents, n_tokens, longest = documents_of(text, loaded, progress)
        spans = {"window": window or None, "stride": stride, "across_documents": across_documents}
        spans |= {"device": loaded.device, "dtype": loaded.dtype}
        spans |= {"progress": lambda done: progress("scoring", done, n_tokens)}
        if method is None:
            score, adapted = score_documents(loaded.model, documents, longest=longest, **spans), None
        else:
            adapted = score_adapted(loaded.model, documents, method, **spans)
            score = adapted.plain
    result = {
        "bpb": score.bpb,
        "nll_per_token": score.nll_per_token,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "documents": score.documents,
        "window": window or None,
        "stride": stride,
        "across_documents": across_documents,
        "yarn": yarn,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "checkpoint": loaded.step,
        "weights": weights,
        "qat": qat,
    }
    result |= score.figures
    if adapted is not None:
        result["adapt"] = adapted.record(method)
    if as_json:
        print(dumps(result))
        return
    context = f"window {window}, stride {stride}" if window else "full documents"
    context += f", matrices in int{loaded.recipe.train.qat.bits}" if qat else ""
    context += ", across documents" if across_documents else ""
    print(f"{score.bpb:.4f} bits per byte on {text or 'validation text'} ({context})")
    if adapted is not None:
        print(describe_gain(result["adapt"]))
    print(f"{score.nll_per_token:.4f} nats per token, {score.tokens:,} tokens")
    print(f"{score.bytes:,} bytes in {score.documents:,} document{'' if score.documents == 1 else 's'}")
    for name, value in score.figures.items():
        rows = value if isinstance(value, list) else [value]
        for layer, row in enumerate(rows):
            numbers = " ".join(f"{number:.4g}" for number in (row if isinstance(row, list) else [row]))
            print(f"{name}{f' {layer}' if rows is value else ''}: {numbers}")


def _round(loaded) -> None:
    """Give a loaded model the values that its recipe's quantisation-aware training computes with.

    Raises:
        ValueError: the run has none, or is quantised already.
    """
    from fusedlm.nn.fake_quantized import FakeQuantization
    from fusedlm.runs.checkpoint import Checkpoints
    from fusedlm.runs.folder import CHECKPOINTS
    from fusedlm.runs.quantization import is_quantized

    config = loaded.recipe.train.qat
    if config is None:
        raise ValueError(f"--qat: {loaded.run} was trained without train.qat")
    if is_quantized(Checkpoints(loaded.run / CHECKPOINTS), loaded.step):
        raise ValueError(f"--qat: {loaded.run} is quantised already; score it without")
    FakeQuantization(loaded.model, **config.model_dump(exclude={"start"})).write()
