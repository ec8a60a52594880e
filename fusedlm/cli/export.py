"""fusedlm export: a run in the format of Transformers or of llama.cpp, or which classes a recipe is."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import CheckpointOption, WeightsOption, checkpoint_name
from fusedlm.cli.packaged import complete_recipe, find_recipe


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run folder; with --explain, a recipe too.",
            autocompletion=complete_recipe,
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR|FILE", help="Folder to write; of gguf, file.", show_default=False)
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="hf|hf-code|gguf",
            help="Format: a class of Transformers; for any recipe, a file of code for it; or that of llama.cpp.",
        ),
    ] = "hf",
    family: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Class to write (default: the first that fits).", show_default=False),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="float32|bfloat16|float16", help="Of the weights; of gguf also q8_0 and mxfp4."),
    ] = "float32",
    explain: Annotated[
        bool, typer.Option("--explain", help="Print which classes fit, and what stands in the way; write nothing.")
    ] = False,
    track: Annotated[
        bool,
        typer.Option("--track", help="Send card and figures to the trackers of RUN: MLflow and Weights & Biases."),
    ] = False,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Write the model of RUN as a folder that Transformers loads (weights, tokenizer, card), or as a file for
    llama.cpp."""
    if to not in ("hf", "hf-code", "gguf"):
        raise ValueError(f"--to {to}: must be hf, hf-code or gguf")
    if explain:
        if folder is not None:
            raise ValueError(f"{folder}: --explain writes nothing; leave it out")
        if track:
            raise ValueError("--track: --explain writes nothing; leave one of them out")
        _explain(_recipe(run), family, as_json)
        return
    if folder is None:
        what = "file to write: fusedlm export RUN --to gguf FILE"
        if to != "gguf":
            what = f"folder to write: fusedlm export RUN --to {to} DIR"
        raise ValueError(f"name the {what}")
    if track:
        from fusedlm.train.loggers.exported import trackers_of

        trackers_of(run)  # before anything is written
    if to == "gguf":
        options = {"family": family, "dtype": dtype, "checkpoint": checkpoint_name(checkpoint), "weights": weights}
        _gguf(run, folder, as_json, track, options)
        return
    from fusedlm.export import export_run

    written = export_run(
        run,
        folder,
        family=family,
        code=to == "hf-code",
        dtype=dtype,
        checkpoint=checkpoint_name(checkpoint),
        weights=weights,
    )
    figures = {
        "format": to,
        "class": written.architecture,
        "dtype": dtype,
        "weights": weights,
        "parameters": written.parameters,
        "step": written.figures.step,
    }
    if written.figures.val_bpb is not None:
        figures["val_bpb"] = written.figures.val_bpb
    if as_json:
        print(json.dumps({"folder": str(folder), "family": written.family, "files": written.files}))
    else:
        print(f"{folder}: {written.architecture}, {written.parameters:,} parameters")
        for name in written.files:
            print(f"  {name}")
    if track:
        _track(run, folder, figures, written.card, as_json)


def _gguf(run: Path, file: Path, as_json: bool, track: bool, options: dict) -> None:
    from fusedlm.export.gguf.write import export_gguf

    written = export_gguf(run, file, **options)
    if as_json:
        print(json.dumps({"file": str(file), "architecture": written.architecture, "tensors": written.tensors}))
    else:
        types = ", ".join(f"{n} {kind}" for kind, n in written.tensors.items())
        print(f"{file}: {written.architecture}, {written.parameters:,} parameters, tensors: {types}")
    if track:
        figures = {
            "format": "gguf",
            "class": written.architecture,
            "dtype": options["dtype"],
            "weights": options["weights"],
            "parameters": written.parameters,
            "step": written.step,
        }
        _track(run, file, figures, None, as_json)


def _track(run: Path, written: Path, figures: dict, card: str | None, quiet: bool) -> None:
    from fusedlm.train.loggers.exported import track_export

    names = track_export(run, written.resolve().name, figures, card)
    if not quiet:
        print(f"tracked by {' and '.join(names)}")


def _recipe(path: Path):
    """Of a run folder, or of a recipe by file or name."""
    from fusedlm.config import load_recipe
    from fusedlm.runs.recipe import run_recipe

    return run_recipe(path) if path.is_dir() else load_recipe(find_recipe(str(path)))


def _explain(recipe, family: str | None, as_json: bool) -> None:
    from fusedlm.export.families import family_named, fits

    every = fits(recipe.model)
    if as_json:
        print(json.dumps({name: [str(obstacle) for obstacle in found] for name, found in every.items()}))
        return
    for name, found in every.items():
        fit = f"{len(found)} key{'s' * (len(found) > 1)} in the way" if found else "fits"
        print(f"{name:17} {family_named(name).architecture:28} {fit}")
    shown = family_named(family).name if family else next(iter(every))
    if every[shown]:
        print(f"\nin the way of {shown}:")
        for obstacle in every[shown]:
            print(f"  {obstacle}")
