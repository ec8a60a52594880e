"""The options of the probes of fusedlm eval, and which probe takes which."""

from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import number, whole_number

ProbeOption = Annotated[
    str | None,
    typer.Option(
        metavar="mqar|needle|extend",
        help="Run a probe instead: recall of pairs, retrieval of a sentence, bits per byte by position.",
        show_default=False,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        parser=whole_number,
        metavar="N",
        help="mqar: steps of training from scratch (default 1000); needle: steps that teach a copy first (default 0).",
        show_default=False,
    ),
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(
        parser=number,
        metavar="LR",
        help="mqar: learning rate (default 0.003); needle: while teaching (default: that of the recipe).",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        parser=whole_number,
        metavar="N",
        help="Test sequences a cell of mqar (256) and needle (16), windows of text of extend (32).",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(parser=whole_number, metavar="S", help="Of mqar and needle (default 0).", show_default=False),
]
PairsOption = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="mqar: pairs to remember (default 4,8,16,32).", show_default=False),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        metavar="X,X,...", help="needle: lengths in training lengths (default 0.5,1,2,4,8).", show_default=False
    ),
]
DepthsOption = Annotated[
    str | None,
    typer.Option(
        metavar="D,D,...", help="needle: from 0 to 1, the end (default 0,0.25,0.5,0.75,1).", show_default=False
    ),
]
FactorsOption = Annotated[
    str | None,
    typer.Option(metavar="F,F,...", help="extend: factors of YaRN (default 2,4,8).", show_default=False),
]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where a probe writes its files (default: RUN/probes).", show_default=False),
]

_TAKES = {
    None: ("text", "window", "stride", "yarn"),
    "mqar": ("pairs", "steps", "lr", "samples", "seed", "out"),
    "needle": ("text", "lengths", "depths", "steps", "lr", "samples", "seed", "yarn", "out"),
    "extend": ("text", "factors", "samples", "out"),
}


def check_options(probe: str | None, options: dict) -> dict:
    """The options that were given, which must be those of the probe (None: plain scoring).

    Raises:
        ValueError: the probe is unknown, or an option belongs to others.
    """
    if probe not in _TAKES:
        raise ValueError(f"--probe {probe!r} is not one of {', '.join(name for name in _TAKES if name)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in _TAKES[probe]:
            owners = " and ".join(_name(other) for other, taken in _TAKES.items() if name in taken)
            raise ValueError(f"--{name} does nothing for {_name(probe)}; it is an option of {owners}")
    return given


def _name(probe: str | None) -> str:
    return f"--probe {probe}" if probe else "scoring without --probe"
