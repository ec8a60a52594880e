"""The recipes and experiments that come with the package, found by name."""

import difflib
from pathlib import Path

import typer

PACKAGE = Path(__file__).parents[1]
EXPERIMENTS = "experiments"


def recipes_folder() -> Path:
    """The folder of the recipes: inside the installed package, or beside it in a clone.

    Raises:
        ValueError: there is none; the package was installed by other means than a wheel or a clone.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "demo.yaml").is_file():
            return folder
    raise ValueError(f"{PACKAGE}: this installation has no recipes; name the file of a recipe")


def packaged_names(kind: str) -> list[str]:
    """Names of all packaged recipes, or of all experiments. kind: "recipe" or "experiment"."""
    return sorted(path.stem for path in _folder(kind).glob("*.yaml"))


def packaged_path(name: str, kind: str) -> Path:
    """The file of a packaged recipe or experiment; the name may have its suffix.

    Raises:
        ValueError: there is none of this name.
    """
    names = packaged_names(kind)
    stem = name.removesuffix(".yaml")
    if stem in names:
        return _folder(kind) / f"{stem}.yaml"
    nearest = difflib.get_close_matches(stem, names, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "; fusedlm recipes lists them"
    raise ValueError(f"{kind} {name}: No such file or directory, and no packaged {kind} has this name{hint}")


def find_recipe(name: str) -> Path:
    """The file that a RECIPE argument means: an existing path; else NAME.yaml in the working directory, which
    `fusedlm recipes copy` makes; else the packaged recipe of this name. Anything with a path separator is a path.

    Raises:
        typer.BadParameter: none of these exists.
    """
    return _find(name, "recipe")


def find_experiment(name: str) -> Path:
    """The same for an EXPERIMENT argument."""
    return _find(name, "experiment")


def complete_recipe(incomplete: str) -> list[str]:
    """What a shell offers for a RECIPE argument: packaged names, and YAML files and folders of the working directory;
    nothing beyond a path separator, where the shell completes files by itself."""
    return _complete(incomplete, "recipe")


def complete_experiment(incomplete: str) -> list[str]:
    """The same for an EXPERIMENT argument."""
    return _complete(incomplete, "experiment")


def _find(name: str, kind: str) -> Path:
    path = Path(name)
    if path.is_file() or path.name != name:
        return path
    if (copied := Path(f"{name}.yaml")).is_file():
        return copied
    try:
        return packaged_path(name, kind)
    except ValueError as error:
        if path.exists():  # a folder or a pipe, which the reader of the file names in its error
            return path
        raise typer.BadParameter(str(error)) from None


def _complete(incomplete: str, kind: str) -> list[str]:
    if "/" in incomplete:
        return []
    here = [f"{path}{'/' * path.is_dir()}" for path in Path().iterdir() if path.is_dir() or path.suffix == ".yaml"]
    return [name for name in [*packaged_names(kind), *sorted(here)] if name.startswith(incomplete)]


def _folder(kind: str) -> Path:
    return recipes_folder() / EXPERIMENTS if kind == "experiment" else recipes_folder()
