"""Options of the probes of fusedlm eval, and the probes that take them."""

from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.adapt_options import ADAPT_OPTIONS
from fusedlm.cli.common import integer, number

ProbeOption = Annotated[
    str | None,
    typer.Option(
        metavar="mqar|needle|extend",
        help="Run a probe instead: associative recall, retrieval of a sentence, bits per byte by position.",
        show_default=False,
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        parser=integer,
        metavar="N",
        help="mqar: training steps from scratch (default 1000); needle: finetuning steps on a copy (default 0).",
        show_default=False,
    ),
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(
        parser=number,
        metavar="LR",
        help="mqar: learning rate (default 0.003); needle: that of finetuning (default: the recipe's).",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        parser=integer,
        metavar="N",
        help="mqar, needle: test sequences per cell (default 256, 16); extend: windows of text (default 32).",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(parser=integer, metavar="S", help="mqar, needle: random seed (default 0).", show_default=False),
]
PairsOption = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="mqar: numbers of pairs (default 4,8,16,32).", show_default=False),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        metavar="X,X,...",
        help="needle: lengths in multiples of the training length (default 0.5,1,2,4,8).",
        show_default=False,
    ),
]
DepthsOption = Annotated[
    str | None,
    typer.Option(
        metavar="D,D,...",
        help="needle: depths from 0 (start) to 1 (end) (default 0,0.25,0.5,0.75,1).",
        show_default=False,
    ),
]
FactorsOption = Annotated[
    str | None,
    typer.Option(metavar="F,F,...", help="extend: YaRN factors (default 2,4,8).", show_default=False),
]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder for the files of a probe (default: RUN/probes).", show_default=False),
]

_TAKES = {
    None: ("text", "data", "window", "stride", "yarn", "qat", "across-documents", *ADAPT_OPTIONS),
    "mqar": ("pairs", "steps", "lr", "samples", "seed", "out"),
    "needle": ("text", "data", "lengths", "depths", "steps", "lr", "samples", "seed", "yarn", "out"),
    "extend": ("text", "data", "factors", "samples", "out"),
}


def check_options(probe: str | None, options: dict) -> dict:
    """The options that were given; all must belong to the probe (None: plain scoring).

    Raises:
        ValueError: the probe is unknown, or it does not take an option.
    """
    if probe not in _TAKES:
        raise ValueError(f"--probe {probe!r}: must be one of {', '.join(name for name in _TAKES if name)}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in _TAKES[probe]:
            owners = " and ".join(_name(other) for other, taken in _TAKES.items() if name in taken)
            raise ValueError(f"--{name} is not an option of {_name(probe)}; it is one of {owners}")
    return given


def _name(probe: str | None) -> str:
    return f"--probe {probe}" if probe else "scoring without --probe"
