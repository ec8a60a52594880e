"""The model card: README.md of an exported model."""

from dataclasses import dataclass

from fusedlm.config import Recipe


@dataclass(frozen=True)
class Figures:
    """What a card says of a run. val_bpb: bits per byte on held-out text, and the step that it is of; None: unknown."""

    parameters: int
    step: int
    weights: str
    val_bpb: float | None
    validated_step: int


def model_card(recipe: Recipe, architecture: str, figures: Figures, *, code: bool = False) -> str:
    """Markdown with the header that model hubs read. code: the folder holds code of its own."""
    train, data = recipe.train, recipe.data
    rows = [
        ("recipe", f"`{recipe.name}`"),
        ("class", f"`{architecture}`"),
        ("parameters", f"{figures.parameters:,}"),
        ("weights", f"{figures.weights}, step {figures.step:,} of {train.steps:,}"),
        ("sequence length", f"{train.seq_len:,} tokens"),
        ("training text", _text(data)),
        ("tokenizer", data.tokenizer.type),
    ]
    if figures.val_bpb is not None:
        at = "" if figures.validated_step == figures.step else f" (step {figures.validated_step:,})"
        rows.append(("held-out bits per byte", f"{figures.val_bpb:.4f}{at}"))
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    description = f"{recipe.description.strip()}\n\n" if recipe.description.strip() else ""
    trust = ", trust_remote_code=True" if code else ""
    without = "" if recipe.model.mtp is None else "\nThe modules of multi-token prediction were left out.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [fusedlm]
---

# {recipe.name}

{description}Trained with fusedlm.

| | |
|---|---|
{table}
{without}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained("."{trust})
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

The tokenizer puts the end-of-text token before each text, as training did, and does not parse special tokens in text.
`fusedlm import . RUN` makes a run folder of it again.
"""


def _text(data) -> str:
    return ", ".join(map(_named, data.named_sources().values()))


def _named(source) -> str:
    path = getattr(source, "path", None)
    return source.type if path is None else f"{source.type} {path.rstrip('/').rpartition('/')[2]}"


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())
