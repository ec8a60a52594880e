"""Mamba 2 layers as classes of Transformers have them, and the hybrids of these and attention: Bamba and Granite."""

from typing import Any

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.families.base import Obstacle, layer_blocks
from fusedlm.export.families.hybrid import FULL, LINEAR, HybridFamily, taps_rule
from fusedlm.export.families.softmax import SoftmaxFamily, attention_shape, factor_keys, read_factors
from fusedlm.export.weights import Rule, same

_UNLIMITED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # as JSON of Python has it, and as Transformers


def mamba2_shape(model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    """What a layer of mamba2 is, by key, with the defaults filled in."""
    mixer = block.mixer
    keys = ("n_heads", "state_dim", "n_groups", "conv_size")
    shape = {f"mixer.{key}": getattr(mixer, key) for key in keys}
    return shape | {"mixer.head_dim": mixer.head_dim or 2 * model.dim // mixer.n_heads}


def expand_obstacles(label: str, where: str, model: ModelConfig, block: BlockConfig) -> list[Obstacle]:
    """Of a class whose inner width is a multiple of the width. where: the key of the block."""
    shape = mamba2_shape(model, block)
    inner = shape["mixer.n_heads"] * shape["mixer.head_dim"]
    if inner % model.dim == 0:
        return []
    reason = f"of {label} n_heads * head_dim is a multiple of dim={model.dim}, not {inner}"
    return [Obstacle(f"{where}.mixer.head_dim", shape["mixer.head_dim"], reason)]


def check_time_steps(config: ConfigJSON) -> None:
    """Raises ValueError if steps are limited, which ours are not."""
    if config.has("time_step_limit") and config.tree["time_step_limit"] not in _UNLIMITED:
        raise config.refusal("time_step_limit", "steps are not limited here")


def mamba2_rules(ours: str, theirs: str) -> list[Rule]:
    """Of the mixer `ours` of a layer, `theirs`."""
    return [
        same(f"{ours}.project.weight", f"{theirs}.in_proj.weight"),
        taps_rule(f"{ours}.conv.weight", f"{theirs}.conv1d.weight"),
        same(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
        same(f"{ours}.out.weight", f"{theirs}.out_proj.weight"),
        same(f"{ours}.log_rate", f"{theirs}.A_log"),
        same(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
        same(f"{ours}.skip", f"{theirs}.D"),
    ]


class MambaHybrid(HybridFamily):
    """Mamba 2, and attention without norms of queries and keys."""

    recurrent = "mamba2"

    def recurrent_shape(self, model, block):
        return mamba2_shape(model, block)

    def recurrent_obstacles(self, where, model, block):
        return expand_obstacles(self.label, where, model, block)

    def recurrent_config(self, shape, block):
        return {
            "mamba_n_heads": shape["mixer.n_heads"],
            "mamba_d_head": shape["mixer.head_dim"],
            "mamba_n_groups": shape["mixer.n_groups"],
            "mamba_d_state": shape["mixer.state_dim"],
            "mamba_d_conv": shape["mixer.conv_size"],
            "mamba_chunk_size": block.mixer.chunk_size,
            "mamba_conv_bias": False,
            "mamba_proj_bias": False,
            "mlp_bias": False,
        }

    def config(self, model, embedding_scale):
        keys = super().config(model, embedding_scale)
        return keys | {"mamba_expand": keys["mamba_n_heads"] * keys["mamba_d_head"] // model.dim}

    def read_recurrent(self, config):
        config.must_be("mamba_conv_bias", False, "there are no biases here", default=True)
        for key in ("mamba_proj_bias", "mlp_bias"):
            config.must_be(key, False, "there are no biases here", default=False)
        check_time_steps(config)
        return {
            "type": "mamba2",
            "n_heads": config.integer("mamba_n_heads"),
            "head_dim": config.integer("mamba_d_head"),
            "state_dim": config.integer("mamba_d_state"),
            "n_groups": config.integer("mamba_n_groups", 1),
            "conv_size": config.integer("mamba_d_conv", 4),
            "chunk_size": config.integer("mamba_chunk_size", 256),
        }

    def attention_rules(self, ours, theirs, model, block):
        return self.attention.attention_rules(ours, f"{theirs}.self_attn", attention_shape(model, block))

    def recurrent_rules(self, ours, theirs, block):
        return mamba2_rules(ours, f"{theirs}.mamba")


class Bamba(MambaHybrid):
    """Its attention has rotary embedding of a part of a head."""

    name, label = "bamba", "Bamba"
    model_type, architecture = "bamba", "BambaForCausalLM"
    final_norm, ffn_norm, ffn = "final_layernorm", "pre_ff_layernorm", "feed_forward"
    attention = SoftmaxFamily(name, label, model_type, architecture, rope="part", free_head_dim=False)

    def layer_keys(self, types):
        return {"attn_layer_indices": [index for index, kind in enumerate(types) if kind == FULL]}

    def config(self, model, embedding_scale):
        keys = super().config(model, embedding_scale)
        return keys | {"attn_rotary_emb": int(keys["head_dim"] * keys["partial_rotary_factor"])}

    def read_layers(self, config, n_layers):
        full = set(config.integers("attn_layer_indices") or ())
        if not 0 < len(full) < n_layers or not full <= set(range(n_layers)):
            raise config.refusal("attn_layer_indices", f"must be some of {n_layers} layers, and not all")
        return [FULL if index in full else LINEAR for index in range(n_layers)]


class GraniteMoeHybrid(MambaHybrid):
    """Without experts. Its attention, if any, has rotary embedding of all of a head or none; the embedding keeps its
    factor. Layers have the names that its published configurations give them; Transformers knows others too."""

    name, label = "granitemoehybrid", "GraniteMoeHybrid"
    model_type, architecture = "granitemoehybrid", "GraniteMoeHybridForCausalLM"
    final_norm, ffn_norm, ffn = "norm", "post_attention_layernorm", "shared_mlp"
    attention = SoftmaxFamily(name, label, model_type, architecture, rope="all or none", free_head_dim=False)
    needs_attention = False
    keeps_embedding_scale = True
    _KINDS = {"attention": FULL, "mamba": LINEAR, FULL: FULL, LINEAR: LINEAR}

    def layer_keys(self, types):
        return {"layer_types": ["attention" if kind == FULL else "mamba" for kind in types]}

    def config(self, model, embedding_scale):
        keys = super().config(model, embedding_scale)
        fraction = keys.pop("partial_rotary_factor")
        keys["rope_parameters"].pop("partial_rotary_factor")
        has_rope = fraction > 0 and any(block.mixer.type == "attention" for _, block in layer_blocks(model))
        keys |= factor_keys(embedding_scale, keys["head_dim"])
        return keys | {
            "position_embedding_type": "rope" if has_rope else None,
            "shared_intermediate_size": keys["intermediate_size"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
        }

    def model(self, config):
        reason = "experts whose weights are a softmax are none of ours; must be 0"
        config.must_be("num_local_experts", 0, reason, default=8)
        n_heads = config.integer("num_attention_heads", 32)
        tree = super().model(config)
        for block in tree["blocks"].values():
            block["ffn"] = {"type": "swiglu", "hidden": config.integer("shared_intermediate_size", 1024)}
            mixer = block["mixer"]
            if mixer["type"] == "attention":
                has_rope = config.text("position_embedding_type", None) == "rope"
                mixer["rope_dim"] = mixer["head_dim"] if has_rope else 0
        read_factors(config, tree["dim"] // n_heads, tree)
        return tree

    def read_layers(self, config, n_layers):
        types = config.texts("layer_types")
        if types is None:
            return [LINEAR] * n_layers
        found = [self._KINDS.get(kind) for kind in types]
        if len(found) != n_layers or None in found or LINEAR not in found:
            reason = f"must be mamba or attention, of {n_layers} layers, and not all attention"
            raise config.refusal("layer_types", reason)
        return found

    def ffn_rules(self, ours, theirs, hidden):
        return [
            same(f"{ours}.gate_up.weight", f"{theirs}.input_linear.weight"),
            same(f"{ours}.down.weight", f"{theirs}.output_linear.weight"),
        ]
