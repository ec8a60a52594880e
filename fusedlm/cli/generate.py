"""fusedlm generate: text from a trained model; one prompt as it is generated, or a file of prompts."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    ModelArgument,
    RuntimeArgument,
    WeightsOption,
    YaRNOption,
    integer,
    load_run,
    number,
    show,
    stretch,
)


def generate(
    run: ModelArgument,
    overrides: RuntimeArgument = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to continue: one per line, or in FILE.jsonl strings or objects with the key prompt. Prints a "
            "JSON object with prompt and text for each, in order.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch", "--batch-size", parser=integer, metavar="N", help="Most prompts of --prompts decoded together."
        ),
    ] = 16,
    max_tokens: Annotated[int, typer.Option(parser=integer, metavar="N", help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(parser=number, metavar="T", help="0 takes the most likely token.")
    ] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(parser=integer, metavar="K", help="Sample from the K most likely.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="P",
            help="Sample from the most likely tokens whose probabilities sum to P.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(parser=integer, metavar="S", help="Random seed of sampling.")] = 0,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Run a step as one CUDA graph; default: on a GPU, where the model allows it.",
            show_default=False,
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the steps first, which takes tens of seconds.")
    ] = False,
    speculate: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            metavar="K",
            help="Draft K tokens per step with the modules of model.mtp; prints the fraction of drafts kept.",
            show_default=False,
        ),
    ] = None,
    yarn: YaRNOption = None,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt, or a file of prompts, with the model of RUN, until end of text or --max-tokens."""
    from fusedlm.generation import Speculation, generate

    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    speculation = None if speculate is None else Speculation(speculate)
    texts = None if prompts is None else read_prompts(prompts)
    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides, files=True)
    stretch(loaded.model, loaded.recipe, yarn)
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "dtype": loaded.dtype,
        "cuda_graph": cuda_graph,
        "compile": compile,
        "speculate": speculation,
    }
    if texts is None:
        pieces = generate(loaded.model, loaded.tokenizer, prompt, seed=seed, stream=True, **options)
        show(prompt)
        for piece in pieces:
            show(piece)
        print()
        _show_acceptance(speculation)
        return
    # Results appear after every few batches, among which prompts are sorted by length.
    n = 8 * max(batch_size, 1)
    for first in range(0, len(texts), n):
        some = texts[first : first + n]
        wrapped = seed + first if seed + first < 2**64 else seed + first - 2**64
        found = generate(loaded.model, loaded.tokenizer, some, seed=wrapped, batch_size=batch_size, **options)
        for one, text in zip(some, found, strict=True):
            print(json.dumps({"prompt": one, "text": text}), flush=True)
    _show_acceptance(speculation)


def _show_acceptance(speculation) -> None:
    """Print what a Speculation counted to standard error: standard output is the text."""
    if speculation is not None and speculation.steps:
        shares = ", ".join(f"{share:.1%}" for share in speculation.acceptance())
        rate = speculation.tokens_per_step()
        print(f"drafts kept, by position: {shares}; {rate:.2f} tokens per step", file=sys.stderr)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or in .jsonl the strings or the key `prompt` of its objects. An empty line of
    text is an empty prompt.

    Raises:
        ValueError: the file cannot be read, has no prompt, or a line is not one; names the line.
    """
    from fusedlm.data.text_files import read_text_file

    try:
        content = read_text_file(path.expanduser())
    except ValueError as error:
        raise ValueError(f"--prompts {error}") from None
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")] if content else []
    if not lines:
        raise ValueError(f"--prompts {path}: holds no prompt; write one per line")
    if path.suffix != ".jsonl":
        return lines
    return [_json_prompt(line, f"--prompts {path}: line {number}") for number, line in enumerate(lines, 1)]


def _json_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'{where}: must be a string, or an object such as {{"prompt": "Once"}}')
    return prompt
