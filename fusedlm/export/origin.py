"""fusedlm.json beside exported weights: the recipe and the text of the run, which config.json has no place for."""

import json
from dataclasses import dataclass
from pathlib import Path

from fusedlm.config import Recipe, dump_recipe, parse_recipe

ORIGIN = "fusedlm.json"


@dataclass(frozen=True)
class Origin:
    """recipe: of the exported model, whose constant factors may be folded. text: fingerprint of its prepared text.
    tokenizer: fingerprint of its tokenizer."""

    recipe: Recipe
    text: str
    tokenizer: str

    def dump(self) -> str:
        tree = {"format": 1, "text": self.text, "tokenizer": self.tokenizer, "recipe": dump_recipe(self.recipe)}
        return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def read_origin(folder: Path) -> Origin | None:
    """None: the weights were exported by another program.

    Raises:
        ValueError: the file is damaged, or its recipe is not valid in this version.
        OSError: it cannot be read.
    """
    path = folder / ORIGIN
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        recipe, text, tokenizer = (tree[key] for key in ("recipe", "text", "tokenizer"))
        if not all(isinstance(value, str) for value in (recipe, text, tokenizer)):
            raise ValueError("a value is not text")
        return Origin(parse_recipe(recipe), text, tokenizer)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: damaged ({reason}); remove it to import without it") from None
