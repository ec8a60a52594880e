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
    checkpoint_name,
    progress_bars,
    whole_number,
)

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
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "model",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Score held-out text with the model of RUN, each token once, and print bits per byte."""
    from fusedlm.evaluate import score_documents
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.train.run import choose_checkpoint, load

    where = resolve_device(device)
    step = choose_checkpoint(run, checkpoint_name(checkpoint))
    model, tokenizer, recipe = load(run, checkpoint=step, weights=weights, device=device)
    if window is None:
        window = recipe.train.seq_len
    with progress_bars() as progress:
        documents, n_tokens = _file_documents(text, tokenizer) if text else _held_out(recipe, tokenizer, progress)
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
        "checkpoint": step,
        "weights": weights,
    }
    if as_json:
        print(json.dumps(result))
        return
    how = f"window {window}, stride {result['stride']}" if window else "whole documents"
    print(f"{score.bpb:.4f} bits per byte on {text or 'held-out text'} ({how})")
    print(f"{score.nll_per_token:.4f} nats a token, {score.tokens:,} tokens")
    print(f"{score.bytes:,} bytes in {score.documents:,} document{'' if score.documents == 1 else 's'}")


def _file_documents(path: Path, tokenizer):
    """(documents, text tokens) of one file."""
    from fusedlm.evaluate import text_documents

    try:
        text = path.read_bytes().decode("utf-8")  # not read_text, which would change line ends and with them the bytes
        documents = text_documents(text, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"--text {path}: {error}") from None
    return documents, sum(len(tokens) - 1 for tokens, _ in documents)


def _held_out(recipe, tokenizer, progress):
    """(documents, text tokens) of the validation text of a run."""
    from fusedlm.data import prepare

    prepared = prepare(recipe.data, progress)
    if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{prepared.directory}: its tokenizer is not the one of the run, whose text has changed since; "
            "name the text to score with --text"
        )
    shards = prepared.validation
    return shards.documents(), shards.n_tokens - shards.n_documents
