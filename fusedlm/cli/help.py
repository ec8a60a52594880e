"""fusedlm help: the keys of recipes and experiments."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Annotated

import typer

KeyArgument = Annotated[
    str,
    typer.Argument(metavar="[KEY]", help="A section or key, such as train.optimizer or model.dim.", show_default=False),
]


def explain(context: typer.Context, key: KeyArgument = "") -> None:
    """Print what KEY of a recipe means, with type and default; without KEY, the sections."""
    from fusedlm.config.reference import look_up

    commands = context.find_root().command.commands
    if not key:
        lines = list(_overview())
    else:
        try:
            lines = [line for found in look_up(key) for line in _describe(found)]
        except ValueError as error:
            command = f"; for the command: fusedlm {key} --help" if key in commands else ""
            raise ValueError(f"{error}{command}") from None
        if key in commands:
            lines.append(f"Of the command: fusedlm {key} --help")
    print("\n".join(lines).rstrip())


def _overview() -> Iterator[str]:
    from fusedlm.config.reference import places

    yield "Sections of a recipe"
    for place in places():
        if place.key == "experiment":
            yield from ("", "Of an experiment")
        if place.key:
            types = ", ".join(section.type for section in place.sections if section.type)
            yield from _wrapped(place.key, 2)
            yield from _wrapped(f"type {types}" if types else place.sections[0].meaning, 6)
    yield ""
    yield from _wrapped("fusedlm help train prints the keys of a section, fusedlm help train.steps one key.")
    yield from _wrapped("Both take the name of a block: fusedlm help model.blocks.NAME.mixer.gdn")


def _describe(found) -> Iterator[str]:
    yield from _wrapped(found.title)
    if found.key is not None:
        yield from _key_lines(found.key)
    elif found.section is not None:
        yield from _wrapped(found.section.meaning, 2)
        for key in found.section.keys:
            yield from ("", f"  {key.name}")
            yield from _key_lines(key, 6)
    yield ""


def _key_lines(key, indent: int = 2) -> Iterator[str]:
    default = key.default if key.default == "required" else f"default {key.default}"
    yield from _wrapped(f"{key.type}; {default}", indent)
    yield from _wrapped(key.meaning, indent)


def _wrapped(text: str, indent: int = 0) -> list[str]:
    width = max(20, min(100, shutil.get_terminal_size().columns - 1))
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
