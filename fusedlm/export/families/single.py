"""Families whose layers are a norm and one part each, a mixer or a feed-forward: Mamba 2 and NemotronH.

A block of ours is one layer of theirs, or two where it has a feed-forward."""

from typing import Any

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.families.base import (
    Family,
    Obstacle,
    differing,
    layer_blocks,
    type_obstacles,
    used_blocks,
    wiring_obstacles,
)
from fusedlm.export.families.experts import (
    expert_keys,
    expert_obstacles,
    expert_rules,
    expert_shape,
    read_experts,
)
from fusedlm.export.families.mamba import check_time_steps, expand_obstacles, mamba2_rules, mamba2_shape
from fusedlm.export.families.softmax import SoftmaxFamily, attention_shape, hidden_width
from fusedlm.export.weights import Rule, same


def _outer_rules(model: ModelConfig) -> list[Rule]:
    rules = [
        same("embedding.weight", "backbone.embeddings.weight"),
        same("head.norm.weight", "backbone.norm_f.weight"),
    ]
    if not model.tie_embeddings:
        rules.append(same("head.weight", "lm_head.weight"))
    return rules


def _no_yarn(model: ModelConfig, label: str) -> list[Obstacle]:
    if model.yarn is None:
        return []
    return [Obstacle("model.yarn.factor", model.yarn.factor, f"{label} has no rotary embedding; set yarn null")]


class Mamba2(Family):
    """Layers of Mamba 2 alone."""

    name, label = "mamba2", "Mamba2"
    model_type, architecture = "mamba2", "Mamba2ForCausalLM"

    def obstacles(self, model):
        found = wiring_obstacles(model, self.label)
        if types := type_obstacles(model, self.label, ("mamba2",), ("none",)):
            return found + types
        found += _no_yarn(model, self.label)
        used = used_blocks(model)
        found += differing(model, self.label, {name: mamba2_shape(model, block) for name, block in used.items()})
        for name, block in used.items():
            found += expand_obstacles(self.label, f"model.blocks.{name}", model, block)
        return found

    def config(self, model, embedding_scale):
        block = layer_blocks(model)[0][1]
        shape = mamba2_shape(model, block)
        return {
            "hidden_size": model.dim,
            "num_hidden_layers": model.n_layers,
            "num_heads": shape["mixer.n_heads"],
            "head_dim": shape["mixer.head_dim"],
            "n_groups": shape["mixer.n_groups"],
            "state_size": shape["mixer.state_dim"],
            "conv_kernel": shape["mixer.conv_size"],
            "chunk_size": block.mixer.chunk_size,
            "expand": shape["mixer.n_heads"] * shape["mixer.head_dim"] // model.dim,
            "hidden_act": "silu",
            "layer_norm_epsilon": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "use_bias": False,
            "use_conv_bias": False,
            "residual_in_fp32": False,
        }

    def model(self, config: ConfigJSON) -> dict:
        config.must_be("use_bias", False, "there are no biases here", default=False)
        config.must_be("use_conv_bias", False, "there are no biases here", default=True)
        config.must_be("hidden_act", "silu", "the convolution is followed by silu here", default="silu")
        check_time_steps(config)
        mixer = {
            "type": "mamba2",
            "n_heads": config.integer("num_heads", 128),
            "head_dim": config.integer("head_dim", 64),
            "n_groups": config.integer("n_groups", 8),
            "state_dim": config.integer("state_size", 128),
            "conv_size": config.integer("conv_kernel", 4),
            "chunk_size": config.integer("chunk_size", 256),
        }
        return {
            "dim": config.integer("hidden_size"),
            "n_layers": config.integer("num_hidden_layers"),
            "pattern": "m",
            "blocks": {"m": {"mixer": mixer, "ffn": {"type": "none"}}},
            "tie_embeddings": config.flag("tie_word_embeddings", False),
            "norm_eps": config.number("layer_norm_epsilon", 1e-5),
            "embedding_rms": None,
        }

    def rules(self, model):
        rules = _outer_rules(model)
        for layer in range(model.n_layers):
            ours, theirs = f"blocks.{layer}", f"backbone.layers.{layer}"
            rules.append(same(f"{ours}.mixer_norm.weight", f"{theirs}.norm.weight"))
            rules += mamba2_rules(f"{ours}.mixer", f"{theirs}.mixer")
        return rules


_MAMBA, _ATTENTION, _DENSE, _EXPERTS = "M*-E"  # the letters of hybrid_override_pattern
# The names of kinds of layers in a list: those of Transformers, and those before.
_NAMES = {
    "linear_attention": _MAMBA,
    "mamba": _MAMBA,
    "full_attention": _ATTENTION,
    "attention": _ATTENTION,
    "mlp": _DENSE,
    "moe": _EXPERTS,
}
_LEAST_STEP = 1e-30  # below every step that changes a state in float32
_EXPERT_DEFAULTS = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


class NemotronH(Family):
    """Mamba 2, attention without rotary embedding, and feed-forwards of squared ReLU, dense or with experts, in any
    order, as long as a mixer comes before each feed-forward. The head has a weight of its own."""

    name, label = "nemotron_h", "NemotronH"
    model_type, architecture = "nemotron_h", "NemotronHForCausalLM"
    attention = SoftmaxFamily(name, label, model_type, architecture, ffn="relu2", rope="none")

    def obstacles(self, model):
        found = wiring_obstacles(model, self.label)
        if types := type_obstacles(model, self.label, ("mamba2", "attention"), ("relu2", "moe", "none")):
            return found + types
        found += _no_yarn(model, self.label)
        if model.tie_embeddings:
            found.append(Obstacle("model.tie_embeddings", True, f"the head of {self.label} is its own; set false"))
        used = used_blocks(model)
        for part, kind, shape in (
            ("mixer", "mamba2", mamba2_shape),
            ("mixer", "attention", attention_shape),
            ("ffn", "relu2", lambda model, block: {"ffn.hidden": hidden_width(model, block)}),
            ("ffn", "moe", expert_shape),
        ):
            of_kind = {name: block for name, block in used.items() if getattr(block, part).type == kind}
            if of_kind:
                found += differing(model, self.label, {name: shape(model, block) for name, block in of_kind.items()})
        for name, block in used.items():
            where = f"model.blocks.{name}"
            if block.mixer.type == "attention":
                found += self.attention.mixer_obstacles(where, model, block)
            elif slope := getattr(block.ffn, "slope", 0.0):
                found.append(Obstacle(f"{where}.ffn.slope", slope, f"{self.label} has none; set 0"))
            if block.ffn.type == "moe":
                found += expert_obstacles(self.label, f"{where}.ffn", block, "relu2")
        return found

    def config(self, model, embedding_scale):
        blocks = [block for _, block in layer_blocks(model)]
        letters = "".join(_letters(block) for block in blocks)
        keys = {
            "hidden_size": model.dim,
            "num_hidden_layers": len(letters),
            "hybrid_override_pattern": letters,
            "layer_norm_epsilon": model.norm_eps,
            "tie_word_embeddings": False,
            "use_bias": False,
            "mlp_bias": False,
            "mlp_hidden_act": "relu2",
            "residual_in_fp32": False,
            **_mamba_keys(model, next((block for block in blocks if block.mixer.type == "mamba2"), None)),
            **_attention_keys(model, next((block for block in blocks if block.mixer.type == "attention"), None)),
        }
        dense = next((block for block in blocks if block.ffn.type == "relu2"), None)
        keys["intermediate_size"] = 4 * model.dim if dense is None else hidden_width(model, dense)
        for block in blocks:
            if block.ffn.type == "moe":
                width = block.ffn.hidden * block.ffn.n_shared
                return keys | expert_keys(block.ffn) | {"moe_shared_expert_intermediate_size": width}
        return keys

    def model(self, config: ConfigJSON) -> dict:
        for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias"):
            config.must_be(key, False, "there are no biases here", default=False)
        config.must_be("mlp_hidden_act", "relu2", "the feed-forward is relu2 here", default="relu2")
        config.must_be("tie_word_embeddings", False, "the class has a head of its own", default=False)
        layers = _blocks(_pattern(config), config)
        readers = {_MAMBA: _read_mamba, _ATTENTION: _read_attention, _DENSE: _read_dense, _EXPERTS: _read_experts}
        parts = {letter: readers[letter](config) for letter in sorted(set("".join(layers)))}
        blocks = {
            _BLOCKS[layer]: {"mixer": parts[layer[0]], "ffn": parts[layer[1]] if layer[1:] else {"type": "none"}}
            for layer in sorted(set(layers))
        }
        return {
            "dim": config.integer("hidden_size"),
            "n_layers": len(layers),
            "pattern": "".join(_BLOCKS[layer] for layer in layers),
            "blocks": blocks,
            "tie_embeddings": False,
            "norm_eps": config.number("layer_norm_epsilon", 1e-5),
            "embedding_rms": None,
        }

    def rules(self, model):
        rules, layer = _outer_rules(model), 0
        for index, (_, block) in enumerate(layer_blocks(model)):
            ours, theirs = f"blocks.{index}", f"backbone.layers.{layer}"
            rules.append(same(f"{ours}.mixer_norm.weight", f"{theirs}.norm.weight"))
            if block.mixer.type == "mamba2":
                rules += mamba2_rules(f"{ours}.mixer", f"{theirs}.mixer")
            else:
                shape = attention_shape(model, block)
                rules += self.attention.attention_rules(f"{ours}.mixer", f"{theirs}.mixer", shape)
            layer += 1
            if block.ffn.type == "none":
                continue
            theirs = f"backbone.layers.{layer}"
            rules.append(same(f"{ours}.ffn_norm.weight", f"{theirs}.norm.weight"))
            if block.ffn.type == "moe":
                rules += expert_rules(f"{ours}.ffn", f"{theirs}.mixer", block)
            else:
                rules += [
                    same(f"{ours}.ffn.{name}.weight", f"{theirs}.mixer.{name}_proj.weight") for name in ("up", "down")
                ]
            layer += 1
        return rules


# The letter of a block in a recipe's pattern, by those of its layers.
_BLOCKS = {"M": "m", "M-": "d", "ME": "e", "*": "a", "*-": "f", "*E": "x"}


def _blocks(letters: str, config: ConfigJSON) -> list[str]:
    """The letters of the layers of each block.

    Raises:
        ValueError: a feed-forward does not follow a mixer.
    """
    found: list[str] = []
    for letter in letters:
        if letter in (_MAMBA, _ATTENTION):
            found.append(letter)
        elif found and len(found[-1]) == 1:
            found[-1] += letter
        else:
            raise ValueError(f"{config.path}: layers {letters[:80]}: a feed-forward follows a mixer here")
    return found


def _letters(block: BlockConfig) -> str:
    """Of the layers of a block."""
    mixer = _MAMBA if block.mixer.type == "mamba2" else _ATTENTION
    return mixer + {"none": "", "relu2": _DENSE, "moe": _EXPERTS}[block.ffn.type]


def _pattern(config: ConfigJSON) -> str:
    """The letters of all layers."""
    for key in ("layers_block_type", "layer_types"):
        if (types := config.texts(key)) is not None:
            if not types or not set(types) <= _NAMES.keys():
                raise config.refusal(key, f"must be a list of {', '.join(_NAMES)}")
            return "".join(_NAMES[kind] for kind in types)
    letters = config.text("hybrid_override_pattern")
    if not letters or not set(letters) <= set(_NAMES.values()):
        raise config.refusal("hybrid_override_pattern", "must be layers of M, *, - and E")
    return letters


def _mamba_keys(model: ModelConfig, block: BlockConfig | None) -> dict[str, Any]:
    """Of a block of mamba2. The class has a lower limit of steps, which ours have not: it is set below all of them."""
    if block is None:
        return {}
    shape = mamba2_shape(model, block)
    return {
        "mamba_num_heads": shape["mixer.n_heads"],
        "mamba_head_dim": shape["mixer.head_dim"],
        "n_groups": shape["mixer.n_groups"],
        "ssm_state_size": shape["mixer.state_dim"],
        "conv_kernel": shape["mixer.conv_size"],
        "chunk_size": block.mixer.chunk_size,
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "use_conv_bias": False,
        "time_step_min": _LEAST_STEP,
    }


def _read_mamba(config: ConfigJSON) -> dict[str, Any]:
    config.must_be("use_conv_bias", False, "there are no biases here", default=True)
    config.must_be("mamba_hidden_act", "silu", "the convolution is followed by silu here", default="silu")
    if config.number("time_step_min", 0.001) > _LEAST_STEP:
        raise config.refusal("time_step_min", "steps are not limited here")
    return {
        "type": "mamba2",
        "n_heads": config.integer("mamba_num_heads", 128),
        "head_dim": config.integer("mamba_head_dim", 64),
        "n_groups": config.integer("n_groups", 8),
        "state_dim": config.integer("ssm_state_size", 128),
        "conv_size": config.integer("conv_kernel", 4),
        "chunk_size": config.integer("chunk_size", 128),
    }


def _attention_keys(model: ModelConfig, block: BlockConfig | None) -> dict[str, Any]:
    if block is None:
        return {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": model.dim}
    shape = attention_shape(model, block)
    return {
        "num_attention_heads": shape["mixer.n_heads"],
        "num_key_value_heads": shape["mixer.n_kv_heads"],
        "head_dim": shape["mixer.head_dim"],
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _read_attention(config: ConfigJSON) -> dict[str, Any]:
    if config.has("sliding_window"):
        raise config.refusal("sliding_window", "attention is to all tokens here")
    n_heads = config.integer("num_attention_heads", 32)
    return {
        "type": "attention",
        "n_heads": n_heads,
        "n_kv_heads": config.integer("num_key_value_heads", 8),
        "head_dim": config.integer("head_dim", 128),
        "rope_dim": 0,
        "qk_norm": False,
    }


def _read_dense(config: ConfigJSON) -> dict[str, Any]:
    return {"type": "relu2", "hidden": config.integer("intermediate_size", 21504)}


def _read_experts(config: ConfigJSON) -> dict[str, Any]:
    if config.has("moe_latent_size"):
        raise config.refusal("moe_latent_size", "experts read all of the width here")
    found = read_experts(config, _EXPERT_DEFAULTS, "relu2")
    width = found["hidden"] * found["n_shared"]
    reason = f"the shared experts have n_shared_experts * moe_intermediate_size = {width} units here"
    config.must_be("moe_shared_expert_intermediate_size", width, reason, default=7688)
    return found
