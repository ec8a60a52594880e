"""fusedlm eval: bits per byte of a trained model on held-out text."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    RunArgument,
    WeightsOption,
    YaRNOption,
    checkpoint_name,
    progress_bars,
    stretch,
    whole_number,
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
from fusedlm.cli.routing import print_routing
from fusedlm.cli.text import file_documents, held_out

TextOption = Annotated[
    Path | None,
    typer.Option(help="Text file to score as one document (default: held-out text of the run).", show_default=False),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        parser=whole_number,
        metavar="N",
        help="Tokens seen at once; 0: each document whole (default: train.seq_len of the recipe).",
        show_default=False,
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        parser=whole_number,
        metavar="N",
        help="Tokens between two windows (default: half the window).",
        show_default=False,
    ),
]


def evaluate(
    run: RunArgument,
    text: TextOption = None,
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
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "model",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score held-out text with the model of RUN, each token once, and print bits per byte; or run a probe."""
    options = {"text": text, "window": window, "stride": stride, "yarn": yarn, "steps": steps, "lr": lr}
    options |= {"samples": samples, "seed": seed, "pairs": pairs, "lengths": lengths, "depths": depths}
    options = check_options(probe, options | {"factors": factors, "out": out})
    if probe is not None:
        run_probe(probe, Target(run, checkpoint, weights, device), options, as_json=as_json)
        return
    from fusedlm.evaluate import score_documents
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.train.run import choose_checkpoint, load

    where = resolve_device(device)
    step = choose_checkpoint(run, checkpoint_name(checkpoint))
    model, tokenizer, recipe = load(run, checkpoint=step, weights=weights, device=device)
    stretch(model, recipe, yarn)
    if window is None:
        window = recipe.train.seq_len
    with progress_bars() as progress:
        documents, n_tokens = file_documents(text, tokenizer) if text else held_out(recipe, tokenizer, progress)
        score = score_documents(
            model,
            documents,
            window=window or None,
            stride=stride,
            device=where,
            dtype=resolve_dtype(recipe.train.dtype, where),
            progress=lambda done: progress("scoring", done, n_tokens),
        )
    result = {
        "bpb": score.bpb,
        "nll_per_token": score.nll_per_token,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "documents": score.documents,
        "window": window or None,
        "stride": (stride or max(1, window // 2)) if window else None,
        "yarn": yarn,
        "checkpoint": step,
        "weights": weights,
    }
    if score.routing is not None:
        result |= score.routing.record()
    if as_json:
        print(json.dumps(result))
        return
    how = f"window {window}, stride {result['stride']}" if window else "whole documents"
    print(f"{score.bpb:.4f} bits per byte on {text or 'held-out text'} ({how})")
    print(f"{score.nll_per_token:.4f} nats a token, {score.tokens:,} tokens")
    print(f"{score.bytes:,} bytes in {score.documents:,} document{'' if score.documents == 1 else 's'}")
    if score.routing is not None:
        print_routing(score.routing)
