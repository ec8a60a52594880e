"""What every family has: the class of Transformers that it is, what fits into it, and the way there and back."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.weights import Rule, same


@dataclass(frozen=True)
class Obstacle:
    """A key of a recipe that a family has no place for, as one line."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.key}={json.dumps(self.value)}: {self.reason}"


class Family(ABC):
    """A class of Transformers.

    Attributes:
        name: of `--family`. label: in messages. model_type, architecture: in config.json.
        keeps_embedding_scale: whether it has a factor of the embedding.
    """

    name: str
    label: str
    model_type: str
    architecture: str
    keeps_embedding_scale = False

    @abstractmethod
    def obstacles(self, model: ModelConfig) -> list[Obstacle]:
        """What stands in the way; []: the model fits. Constant factors that `folded` removes do not."""

    @abstractmethod
    def config(self, model: ModelConfig, embedding_scale: float) -> dict:
        """Of config.json what depends on the model section, which fits and is folded.

        Args:
            embedding_scale: factor of the embedding, for a family that keeps it.
        """

    @abstractmethod
    def model(self, config: ConfigJSON) -> dict:
        """A model section, as a tree, from config.json; the inverse of `config`.

        Raises:
            ValueError: the configuration is one that our decoder does not compute; names the key.
        """

    @abstractmethod
    def rules(self, model: ModelConfig) -> list[Rule]:
        """Of every tensor of a folded model."""


def layer_blocks(model: ModelConfig) -> list[tuple[str, BlockConfig]]:
    """(name, block) of each layer."""
    names = (model.pattern[i % len(model.pattern)] for i in range(model.n_layers))
    return [(name, model.blocks[name]) for name in names]


def used_blocks(model: ModelConfig) -> dict[str, BlockConfig]:
    """The blocks that the pattern names, in order."""
    return dict(layer_blocks(model))


def wiring_obstacles(model: ModelConfig, label: str, has: tuple[str, ...] = ()) -> list[Obstacle]:
    """Of what stands between embedding, blocks and head. has: the keys that the class has a place for."""
    found = []
    for key, off in (
        ("logit_softcap", None),
        ("logit_rescale", None),
        ("bigram", None),
        ("smear", False),
        ("x0_mixing", False),
        ("unet_skips", False),
        ("embedding_norm", False),
        ("norm_gain", True),
    ):
        value = getattr(model, key)
        if value != off and key not in has:
            value = value.model_dump() if hasattr(value, "model_dump") else value
            what = "it" if off is True else "none"
            found.append(Obstacle(f"model.{key}", value, f"{label} has {what}; set {json.dumps(off)}"))
    return found


def type_obstacles(model: ModelConfig, label: str, mixers: tuple[str, ...], ffns: tuple[str, ...]) -> list[Obstacle]:
    """Of mixers and feed-forwards of other types."""
    found = []
    for name, block in used_blocks(model).items():
        for part, known in (("mixer", mixers), ("ffn", ffns)):
            kind = getattr(block, part).type
            if kind not in known:
                found.append(Obstacle(f"model.blocks.{name}.{part}.type", kind, f"{label} has {' or '.join(known)}"))
    return found


def differing(model: ModelConfig, label: str, shapes: dict[str, dict[str, Any]]) -> list[Obstacle]:
    """Of layers that are not alike, where a family has the same in all of them.

    Args:
        shapes: of each block, by its name, values by key, with the defaults filled in.
    """
    (first, expected), *others = shapes.items()
    return [
        Obstacle(f"model.blocks.{name}.{key}", value, f"the layers of {label} are alike, and block {first} has {shown}")
        for name, shape in others
        for key, value in shape.items()
        if value != expected[key]
        for shown in [json.dumps(expected[key])]
    ]


def outer_rules(model: ModelConfig) -> list[Rule]:
    """Embedding, final norm and head, under the names that nearly all classes have."""
    rules = [same("embedding.weight", "model.embed_tokens.weight"), same("head.norm.weight", "model.norm.weight")]
    if not model.tie_embeddings:
        rules.append(same("head.weight", "lm_head.weight"))
    return rules


def norm_rules(layer: int) -> list[Rule]:
    """The two norms of a block."""
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    return [
        same(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight"),
        same(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
    ]
