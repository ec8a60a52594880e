"""fusedlm generate: text from a trained model, printed as it is generated."""

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
    number,
    show,
    stretch,
)


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    overrides: RuntimeArgument = None,
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
    yarn: YaRNOption = None,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "model",
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt with the model of RUN, until end of text or --max-tokens."""
    from fusedlm.generate import generate

    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device=device, overrides=overrides)
    stretch(loaded.model, loaded.recipe, yarn)
    pieces = generate(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=loaded.device,
        dtype=loaded.dtype,
    )
    show(prompt)
    for piece in pieces:
        show(piece)
    print()
