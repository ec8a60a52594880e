"""Families of softmax attention in all layers, which differ in few things from Llama."""

from dataclasses import dataclass
from typing import Any

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.families.base import (
    Family,
    Obstacle,
    differing,
    layer_blocks,
    norm_rules,
    outer_rules,
    type_obstacles,
    used_blocks,
    wiring_obstacles,
)
from fusedlm.export.families.rope import read_rope, rope_keys
from fusedlm.export.weights import Rule, rows, same
from fusedlm.nn.ffn.swiglu import default_hidden


def attention_shape(model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    """What a layer of attention is, by key, with the defaults filled in."""
    mixer = block.mixer
    head_dim = mixer.head_dim or model.dim // mixer.n_heads
    return {
        "mixer.n_heads": mixer.n_heads,
        "mixer.n_kv_heads": mixer.n_kv_heads or mixer.n_heads,
        "mixer.head_dim": head_dim,
        "mixer.rope_dim": head_dim if mixer.rope_dim is None else mixer.rope_dim,
        "mixer.rope_base": mixer.rope_base,
        "mixer.window": mixer.window,
    }


def hidden_width(model: ModelConfig, block: BlockConfig) -> int:
    """Of a swiglu or relu2 feed-forward."""
    default = default_hidden(model.dim) if block.ffn.type == "swiglu" else 4 * model.dim
    return block.ffn.hidden or default


@dataclass(frozen=True)
class SoftmaxFamily(Family):
    """Attention and one type of feed-forward.

    ffn: type of the feed-forward.
    qk_norm: whether queries and keys have norms. qk_gain: the gains of these.
    window: whether it has a sliding window. mixed_windows: whether some layers can have it and others not.
    rope: what of a head is rotated: all, part (at least one pair), none, or "all or none".
    yarn: whether it has YaRN. output_gate: whether it has an output gate.
    fused: q, k and v are one tensor, and gate and up.
    free_head_dim: whether a head can be wider or narrower than dim / n_heads.
    keeps_embedding_scale: as of `Family`; it then has factors of residual branches, scores and logits too.
    """

    name: str
    label: str
    model_type: str
    architecture: str
    ffn: str = "swiglu"
    qk_norm: bool = False
    qk_gain: str = "dim"
    window: bool = False
    mixed_windows: bool = False
    rope: str = "all"
    yarn: bool = True
    output_gate: bool = False
    fused: bool = False
    free_head_dim: bool = True
    keeps_embedding_scale: bool = False

    def obstacles(self, model):
        found = self.wiring_obstacles(model)
        if types := type_obstacles(model, self.label, ("attention",), (self.ffn,)):
            return found + types
        if model.yarn is not None and not self.yarn:
            found.append(Obstacle("model.yarn.factor", model.yarn.factor, f"{self.label} has no YaRN; set yarn null"))
        shapes = {name: self._shape(model, block) for name, block in used_blocks(model).items()}
        if self.mixed_windows:
            shapes = _without_windows(shapes)
        found += differing(model, self.label, shapes)
        for name, block in used_blocks(model).items():
            found += self.mixer_obstacles(f"model.blocks.{name}", model, block)
        return found

    def wiring_obstacles(self, model: ModelConfig) -> list[Obstacle]:
        """Of what stands between embedding, blocks and head."""
        return wiring_obstacles(model, self.label)

    def _shape(self, model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
        return attention_shape(model, block) | {"ffn.hidden": hidden_width(model, block)}

    def mixer_obstacles(self, where: str, model: ModelConfig, block: BlockConfig) -> list[Obstacle]:
        """Of a block of attention by itself; where: its key."""
        mixer, label = block.mixer, self.label
        found = [
            Obstacle(f"{where}.mixer.{key}", True, f"{label} has none; set false")
            for key in ("xsa", "value_residual", "output_gate")
            if getattr(mixer, key) and not (key == "output_gate" and self.output_gate)
        ]
        if mixer.qk_norm != self.qk_norm:
            reason = f"{label} has it; set true" if self.qk_norm else f"{label} has none; set false"
            found.append(Obstacle(f"{where}.mixer.qk_norm", mixer.qk_norm, reason))
        elif self.qk_norm and mixer.qk_gain != self.qk_gain:
            reason = f"{label} has {_GAINS[self.qk_gain]}; set {self.qk_gain}"
            found.append(Obstacle(f"{where}.mixer.qk_gain", mixer.qk_gain, reason))
        if (width := mixer.value_embedding) is not None:
            found.append(Obstacle(f"{where}.mixer.value_embedding", width, f"{label} has none; set null"))
        if mixer.window is not None and not self.window:
            found.append(Obstacle(f"{where}.mixer.window", mixer.window, f"{label} attends to all; set null"))
        shape = attention_shape(model, block)
        head_dim, rope_dim = shape["mixer.head_dim"], shape["mixer.rope_dim"]
        fits, reason = _ROPE[self.rope]
        if not fits(rope_dim, head_dim):
            found.append(Obstacle(f"{where}.mixer.rope_dim", rope_dim, f"{label} {reason}"))
        if model.dim % mixer.n_heads:
            found.append(Obstacle(f"{where}.mixer.n_heads", mixer.n_heads, f"of {label} it divides dim={model.dim}"))
        elif not self.free_head_dim and head_dim != model.dim // mixer.n_heads:
            wanted = model.dim // mixer.n_heads
            found.append(Obstacle(f"{where}.mixer.head_dim", head_dim, f"of {label} it is dim / n_heads = {wanted}"))
        if slope := getattr(block.ffn, "slope", 0.0):
            found.append(Obstacle(f"{where}.ffn.slope", slope, f"{label} has none; set 0"))
        return found

    def config(self, model, embedding_scale):
        block = layer_blocks(model)[0][1]
        shape = attention_shape(model, block)
        head_dim = shape["mixer.head_dim"]
        fraction = rope_fraction(shape["mixer.rope_dim"], head_dim) if self.rope == "part" else None
        keys = {
            "hidden_size": model.dim,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": shape["mixer.n_heads"],
            "num_key_value_heads": shape["mixer.n_kv_heads"],
            "head_dim": head_dim,
            "intermediate_size": hidden_width(model, block),
            "hidden_act": {"swiglu": "silu", "relu2": "relu2"}[self.ffn],
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
        } | rope_keys(shape["mixer.rope_base"], model.yarn, fraction=fraction)
        if self.mixed_windows:
            keys |= _window_keys(model)
        elif self.window:
            keys["sliding_window"] = shape["mixer.window"]
        if self.keeps_embedding_scale:
            keys |= factor_keys(embedding_scale, head_dim)
        return keys

    def model(self, config: ConfigJSON) -> dict:
        for key in ("attention_bias", "mlp_bias"):
            config.must_be(key, False, "there are no biases here", default=False)
        activation = {"swiglu": "silu", "relu2": "relu2"}[self.ffn]
        config.must_be("hidden_act", activation, f"the feed-forward is {self.ffn} here", default=activation)
        dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
        base, fraction, yarn = read_rope(config)
        if n_heads < 1:
            raise config.refusal("num_attention_heads", "must be at least 1")
        head_dim = config.integer("head_dim", dim // n_heads)
        mixer = {
            "type": "attention",
            "n_heads": n_heads,
            "n_kv_heads": config.integer("num_key_value_heads", n_heads),
            "head_dim": head_dim,
            "rope_dim": int(head_dim * fraction) if self.rope == "part" else None,
            "rope_base": base,
            "qk_norm": self.qk_norm,
            "qk_gain": self.qk_gain if self.qk_norm else "head",
            "window": config.integer("sliding_window", None) if self.window and not self.mixed_windows else None,
        }
        ffn = {"type": self.ffn, "hidden": config.integer("intermediate_size")}
        tree = {
            "dim": dim,
            "n_layers": config.integer("num_hidden_layers"),
            "pattern": "a",
            "blocks": {"a": {"mixer": mixer, "ffn": ffn}},
            "tie_embeddings": config.flag("tie_word_embeddings", False),
            "norm_eps": config.number("rms_norm_eps", 1e-6),
            "embedding_rms": None,
            "yarn": yarn,
        }
        if self.mixed_windows:
            _read_windows(config, tree)
        if self.keeps_embedding_scale:
            read_factors(config, head_dim, tree)
        return tree

    def rules(self, model):
        rules = outer_rules(model)
        for layer, (_, block) in enumerate(layer_blocks(model)):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            rules += norm_rules(layer)
            rules += self.attention_rules(f"{ours}.mixer", f"{theirs}.self_attn", attention_shape(model, block))
            rules += self._ffn_rules(f"{ours}.ffn", f"{theirs}.mlp", hidden_width(model, block))
        return rules

    def attention_rules(self, ours: str, theirs: str, shape: dict[str, Any]) -> list[Rule]:
        """Of a layer of attention.

        Args:
            ours, theirs: what the names of its tensors begin with.
            shape: of `attention_shape`.
        """
        out = same(f"{ours}.out.weight", f"{theirs}.o_proj.weight")
        if self.fused:
            return [same(f"{ours}.qkv.weight", f"{theirs}.qkv_proj.weight"), out]
        heads = {"q": shape["mixer.n_heads"], "k": shape["mixer.n_kv_heads"], "v": shape["mixer.n_kv_heads"]}
        parts = {f"{theirs}.{name}_proj.weight": n * shape["mixer.head_dim"] for name, n in heads.items()}
        has_gains = self.qk_norm and self.qk_gain == "dim"
        norms = [same(f"{ours}.{name}_gain", f"{theirs}.{name}_norm.weight") for name in "qk" if has_gains]
        return [rows(f"{ours}.qkv.weight", parts), *norms, out]

    def _ffn_rules(self, ours: str, theirs: str, hidden: int) -> list[Rule]:
        down = same(f"{ours}.down.weight", f"{theirs}.down_proj.weight")
        if self.ffn == "relu2":
            return [same(f"{ours}.up.weight", f"{theirs}.up_proj.weight"), down]
        if self.fused:
            return [same(f"{ours}.gate_up.weight", f"{theirs}.gate_up_proj.weight"), down]
        return [swiglu_rule(ours, theirs, hidden), down]


def factor_keys(embedding_scale: float, head_dim: int) -> dict:
    """Granite's factors."""
    return {
        "embedding_multiplier": embedding_scale,
        "attention_multiplier": head_dim**-0.5,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def read_factors(config: ConfigJSON, head_dim: int, tree: dict) -> None:
    """Set what the factors of Granite are in a model section.

    Raises:
        ValueError: one is none that our decoder has.
    """
    for key in ("residual_multiplier", "logits_scaling"):
        config.must_be(key, 1, "it is 1 here", default=1)
    config.must_be("attention_multiplier", head_dim**-0.5, f"it is {head_dim**-0.5} here", default=1)
    scale = config.number("embedding_multiplier", 1.0)
    if scale != 1.0:
        tree["embedding_std"], tree["embedding_rms"] = 1.0, scale  # whose quotient is the factor


def swiglu_rule(ours: str, theirs: str, hidden: int) -> Rule:
    """Gate and up."""
    return rows(f"{ours}.gate_up.weight", {f"{theirs}.{name}_proj.weight": hidden for name in ("gate", "up")})


def rope_fraction(rope_dim: int, head_dim: int) -> float:
    """The fraction of a head of which Transformers computes the same number of dimensions, by int(head_dim *
    fraction)."""
    fraction = rope_dim / head_dim
    return fraction if int(head_dim * fraction) == rope_dim else (rope_dim + 0.5) / head_dim


def _without_windows(shapes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For `differing`: the windows of blocks that have one must be equal, those of others are left out."""
    windows = [shape["mixer.window"] for shape in shapes.values() if shape["mixer.window"] is not None]
    return {
        name: shape | {"mixer.window": shape["mixer.window"] or (windows[0] if windows else None)}
        for name, shape in shapes.items()
    }


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _window_keys(model: ModelConfig) -> dict[str, Any]:
    """The window, and which layers have it."""
    windows = [block.mixer.window for _, block in layer_blocks(model)]
    types = [_FULL if window is None else _SLIDING for window in windows]
    window = next((window for window in windows if window is not None), None)
    first = types.index(_SLIDING) if window is not None else model.n_layers
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": types,
    }


def _read_windows(config: ConfigJSON, tree: dict) -> None:
    """Set the windows of the layers of a model section."""
    window = config.integer("sliding_window", None) if config.flag("use_sliding_window", False) else None
    types = config.texts("layer_types")
    if types is None:
        if window is not None:
            raise config.refusal("layer_types", "must say which layers have the window")
        return
    if len(types) != tree["n_layers"] or not set(types) <= {_FULL, _SLIDING}:
        raise config.refusal("layer_types", f"must be {_FULL} or {_SLIDING} of {tree['n_layers']} layers")
    if _SLIDING in types:
        if window is None:
            raise config.refusal("sliding_window", "layers of layer_types have a window")
        block = tree["blocks"]["a"]
        tree["blocks"]["w"] = block | {"mixer": block["mixer"] | {"window": window}}
        tree["pattern"] = "".join("w" if kind == _SLIDING else "a" for kind in types)


_GAINS = {"dim": "gains per dimension", "none": "no gains"}
# By what a class rotates of a head: whether so many of so many dimensions fit, and what it does.
_ROPE = {
    "all": (lambda rope_dim, head_dim: rope_dim == head_dim, "rotates all of a head; set null"),
    "part": (lambda rope_dim, head_dim: rope_dim > 0, "has rotary embedding; set null, or a part of the head"),
    "none": (lambda rope_dim, head_dim: rope_dim == 0, "has no rotary embedding; set 0"),
    "all or none": (lambda rope_dim, head_dim: rope_dim in (0, head_dim), "rotates all of a head or none; set null"),
}

LLAMA = SoftmaxFamily("llama", "Llama", "llama", "LlamaForCausalLM")
MISTRAL = SoftmaxFamily("mistral", "Mistral", "mistral", "MistralForCausalLM", window=True)
QWEN3 = SoftmaxFamily(
    "qwen3", "Qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm=True, window=True, mixed_windows=True
)
GRANITE = SoftmaxFamily("granite", "Granite", "granite", "GraniteForCausalLM", keeps_embedding_scale=True)
ARCEE = SoftmaxFamily("arcee", "Arcee", "arcee", "ArceeForCausalLM", ffn="relu2")
PHI3 = SoftmaxFamily(
    "phi3",
    "Phi3",
    "phi3",
    "Phi3ForCausalLM",
    window=True,
    rope="part",
    yarn=False,
    fused=True,
    free_head_dim=False,
)
