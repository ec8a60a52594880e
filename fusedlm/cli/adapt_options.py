"""Options of fusedlm eval for score-first adaptation."""

from typing import Annotated

import typer

from fusedlm.cli.common import integer, number

AdaptOption = Annotated[
    str | None,
    typer.Option(
        metavar="ngram|tilt|finetune",
        help="Score once more with a model that adapts to the text that it has scored.",
        show_default=False,
    ),
]
AdaptParametersOption = Annotated[
    str | None,
    typer.Option(metavar="norms|low_rank", help="finetune: what is trained (default norms).", show_default=False),
]
AdaptRankOption = Annotated[
    int | None,
    typer.Option(parser=integer, metavar="N", help="finetune: rank of low_rank (default 4).", show_default=False),
]
AdaptLearningRateOption = Annotated[
    float | None,
    typer.Option(parser=number, metavar="LR", help="finetune: learning rate (default 0.003).", show_default=False),
]
AdaptChunkOption = Annotated[
    int | None,
    typer.Option(
        parser=integer,
        metavar="N",
        help="finetune: tokens that are scored between two steps (default 512).",
        show_default=False,
    ),
]
AdaptStepsOption = Annotated[
    int | None,
    typer.Option(parser=integer, metavar="N", help="finetune: steps on each chunk (default 1).", show_default=False),
]
AdaptResetOption = Annotated[
    bool,
    typer.Option("--adapt-reset", help="Begin each document anew: counts, or the parameters that are trained."),
]
_OF_FINETUNE = ("parameters", "rank", "lr", "chunk", "steps")
ADAPT_OPTIONS = ("adapt", *(f"adapt-{name}" for name in (*_OF_FINETUNE, "reset")))


def adaptation(name: str | None, options: dict):
    """The method of --adapt with its options, those that are None left out; None without --adapt.

    Raises:
        ValueError: the method is unknown, does not take an option, or a value is out of range.
    """
    given = {option: value for option, value in options.items() if value is not None}
    if name is None:
        for option in given:
            raise ValueError(f"--adapt-{option}: needs --adapt")
        return None
    from fusedlm.evaluate.adapt import Finetune, HintTilt, NgramMixture

    methods = {"ngram": NgramMixture, "tilt": HintTilt, "finetune": Finetune}
    if name not in methods:
        raise ValueError(f"--adapt {name!r}: must be one of {', '.join(methods)}")
    for option in given:
        if option in _OF_FINETUNE and name != "finetune":
            raise ValueError(f"--adapt-{option}: only for --adapt finetune")
    if "rank" in given and given.get("parameters") != "low_rank":
        raise ValueError(f"--adapt-rank {given['rank']}: needs --adapt-parameters low_rank")
    try:
        return methods[name](**given)
    except ValueError as error:
        raise ValueError(f"--adapt-{str(error).replace('=', ' ', 1)}") from None


def describe_gain(record: dict) -> str:
    """The record of `AdaptedScore` in a few lines."""
    line = f"{record['adapted_bpb']:.4f} bits per byte with {record['method']}, {record['gain']:+.5f} gained"
    if record["gain_low"] is not None:
        line += f" (95% interval {record['gain_low']:+.5f} to {record['gain_high']:+.5f}, "
        line += f"{record['units']} {record['resampled']})"
    plain, adapted = record["plain_microseconds_per_token"], record["adapted_microseconds_per_token"]
    return f"{line}\n{plain:.1f} microseconds per token, {adapted:.1f} with {record['method']}"
