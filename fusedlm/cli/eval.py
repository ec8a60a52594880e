"""fusedlm eval: bits per byte of a trained model on validation text, probes, and benchmark tasks."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    RunArgument,
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


def evaluate(
    run: RunArgument,
    overrides: RuntimeArgument = None,
    text: TextOption = None,
    data: DataOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
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
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Score validation text with the model of RUN, each token once, and print bits per byte; or run probes or tasks."""
    options = {"text": text, "data": data, "window": window, "stride": stride, "yarn": yarn, "steps": steps, "lr": lr}
    options |= {"samples": samples, "seed": seed, "pairs": pairs, "lengths": lengths, "depths": depths}
    options |= {"factors": factors, "out": out}
    check_task_options(tasks, shots, limit, options | {"probe": probe})
    if tasks is not None:
        loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides)
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

    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides, data=data)
    stretch(loaded.model, loaded.recipe, yarn)
    if window is None:
        window = loaded.recipe.train.seq_len
    if window and stride is None:
        stride = default_stride(window)
    with progress_bars() as progress:
        documents, n_tokens, longest = documents_of(text, loaded, progress)
        score = score_documents(
            loaded.model,
            documents,
            window=window or None,
            stride=stride,
            longest=longest,
            device=loaded.device,
            dtype=loaded.dtype,
            progress=lambda done: progress("scoring", done, n_tokens),
        )
    result = {
        "bpb": score.bpb,
        "nll_per_token": score.nll_per_token,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "documents": score.documents,
        "window": window or None,
        "stride": stride,
        "yarn": yarn,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "checkpoint": loaded.step,
        "weights": weights,
    }
    result |= score.figures
    if as_json:
        print(json.dumps(result))
        return
    context = f"window {window}, stride {stride}" if window else "full documents"
    print(f"{score.bpb:.4f} bits per byte on {text or 'validation text'} ({context})")
    print(f"{score.nll_per_token:.4f} nats per token, {score.tokens:,} tokens")
    print(f"{score.bytes:,} bytes in {score.documents:,} document{'' if score.documents == 1 else 's'}")
    for name, value in score.figures.items():
        rows = value if isinstance(value, list) else [value]
        for layer, row in enumerate(rows):
            numbers = " ".join(f"{number:.4g}" for number in (row if isinstance(row, list) else [row]))
            print(f"{name}{f' {layer}' if rows is value else ''}: {numbers}")
