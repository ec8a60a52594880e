"""fusedlm generate: text from a trained model, as it comes."""

from typing import Annotated

import typer

from fusedlm.cli.common import (
    CheckpointOption,
    DeviceOption,
    RunArgument,
    WeightsOption,
    YaRNOption,
    checkpoint_name,
    number,
    show,
    stretch,
    whole_number,
)


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_tokens: Annotated[
        int, typer.Option(parser=whole_number, metavar="N", help="Stop after this many tokens.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(parser=number, metavar="T", help="0 takes the likeliest token every time.")
    ] = 1.0,
    top_k: Annotated[
        int | None,
        typer.Option(parser=whole_number, metavar="K", help="Draw from the K likeliest tokens.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="P",
            help="Draw from the likeliest tokens whose probabilities sum to P.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(parser=whole_number, metavar="S", help="The same seed gives the same text.")] = 0,
    yarn: YaRNOption = None,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "model",
    device: DeviceOption = "auto",
) -> None:
    """Continue a prompt with the model of RUN, until end of text or --max-tokens."""
    from fusedlm.generate import generate
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.train.run import load

    where = resolve_device(device)
    model, tokenizer, recipe = load(run, checkpoint=checkpoint_name(checkpoint), weights=weights, device=device)
    stretch(model, recipe, yarn)
    pieces = generate(
        model,
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=where,
        dtype=resolve_dtype(recipe.train.dtype, where),
    )
    show(prompt)
    for piece in pieces:
        show(piece)
    print()
