"""Write docs/recipes.md, the reference of all keys of recipes and experiments, from the schema.

    python scripts/recipe_keys.py
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/recipes.md"

INTRODUCTION = """\
# Keys of recipes and experiments

<!-- written by scripts/recipe_keys.py from fusedlm/config; change the docstrings there -->

A recipe is a YAML file with the sections `model`, `data`, `train` and `runtime`. `fusedlm help train.optimizer`
prints a section of this page, `fusedlm help train.optimizer.lr` a key. A section of several types needs its `type`; a
section that is left out has the default type.

On the command line, `key=value` changes a recipe, and `experiment.key=value` an experiment. The value of a text key
is the text after `=` as it stands (`data.source.separator=###`), or the text between quotes; `null` is no text where
the key can be null. Any other value is YAML: `model.dim=256`, `'train.schedule={type: cosine, warmup: 0.05}'`. In
keys, NAME is the name of a block.

Numbers and booleans are those of YAML 1.2. What YAML 1.1 reads as another value is an error: write `10` or `"010"`,
not `010`; `true`, not `yes`; `1000`, not `1_000`. Aliases (`*a`) and merge keys (`<<: *a`) are copies: changing one
leaves the other as it is. A key given twice is an error.
"""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of docs/recipes.md."""
    from fusedlm.config.reference import places

    lines = [INTRODUCTION]
    printed = {}
    for place in places():
        title = f"`{place.key}`" if place.key else "Recipe"
        lines += [f"## {title}", ""]
        if place.sections in printed:
            lines += [f"As `{printed[place.sections]}`.", ""]
            continue
        printed[place.sections] = place.key
        for section in place.sections:
            if section.type is not None:
                lines += [f"### type: {section.type}", ""]
            lines += [_cell(section.meaning), "", "| key | type | default | |", "|---|---|---|---|"]
            lines += [
                f"| `{key.name}` | {_cell(key.type)} | {_default(key.default)} | {_cell(key.meaning)} |"
                for key in section.keys
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _default(text: str) -> str:
    return text if text in ("required", "all defaults") else f"`{text.replace('|', chr(92) + '|')}`"


def _cell(text: str) -> str:
    """Text outside of code spans with the characters escaped that Markdown would take for markup."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        for character in "\\*|<":
            parts[index] = parts[index].replace(character, f"\\{character}")
    return "`".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
