"""Families of recurrent layers and layers of softmax attention, all with swiglu."""

from abc import abstractmethod
from typing import Any

import torch

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
from fusedlm.export.families.rope import read_rope, rope_keys
from fusedlm.export.families.softmax import SoftmaxFamily, attention_shape, hidden_width, rope_fraction, swiglu_rule
from fusedlm.export.weights import Rule, rows, same

_FULL, _LINEAR = "full_attention", "linear_attention"
_UNLIMITED = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])  # as JSON of Python has it, and as Transformers


class HybridFamily(Family):
    """One kind of recurrent layer and one of attention, in any order.

    Attributes:
        recurrent: type of the recurrent mixer. attention: what its attention has.
        final_norm, ffn_norm, ffn: what the class calls the last norm, and in a layer the second norm and feed-forward.
    """

    recurrent: str
    attention: SoftmaxFamily
    final_norm: str
    ffn_norm: str
    ffn: str

    def obstacles(self, model):
        found = wiring_obstacles(model, self.label)
        if types := type_obstacles(model, self.label, ("attention", self.recurrent), ("swiglu",)):
            return found + types
        if model.yarn is not None:
            found.append(Obstacle("model.yarn.factor", model.yarn.factor, f"{self.label} has no YaRN; set yarn null"))
        used = used_blocks(model)
        for kind, shape in (("attention", attention_shape), (self.recurrent, self.recurrent_shape)):
            shapes = {name: shape(model, block) for name, block in used.items() if block.mixer.type == kind}
            if shapes:
                found += differing(model, self.label, shapes)
            else:
                found.append(Obstacle("model.pattern", model.pattern, f"{self.label} has layers of {kind} too"))
        hidden = {name: {"ffn.hidden": hidden_width(model, block)} for name, block in used.items()}
        found += differing(model, self.label, hidden)
        for name, block in used.items():
            if block.mixer.type == "attention":
                found += self.attention.mixer_obstacles(f"model.blocks.{name}", model, block)
            else:
                found += self.recurrent_obstacles(f"model.blocks.{name}", model, block)
        return found

    @abstractmethod
    def recurrent_shape(self, model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
        """What a recurrent layer is, by key, with the defaults filled in."""

    def recurrent_obstacles(self, where: str, model: ModelConfig, block: BlockConfig) -> list[Obstacle]:
        """Of a recurrent block by itself."""
        return []

    @abstractmethod
    def recurrent_config(self, shape: dict[str, Any], block: BlockConfig) -> dict:
        """Its keys of config.json."""

    def layer_keys(self, types: list[str]) -> dict:
        """Of config.json which layers are full and which linear attention."""
        return {"layer_types": types}

    def config(self, model, embedding_scale):
        blocks = {block.mixer.type: block for _, block in layer_blocks(model)}
        attention, recurrent = blocks["attention"], blocks[self.recurrent]
        shape = attention_shape(model, attention)
        fraction = rope_fraction(shape["mixer.rope_dim"], shape["mixer.head_dim"])
        types = [_FULL if block.mixer.type == "attention" else _LINEAR for _, block in layer_blocks(model)]
        return {
            "hidden_size": model.dim,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": shape["mixer.n_heads"],
            "num_key_value_heads": shape["mixer.n_kv_heads"],
            "head_dim": shape["mixer.head_dim"],
            "intermediate_size": hidden_width(model, attention),
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            **rope_keys(shape["mixer.rope_base"], None, fraction=fraction),
            **self.layer_keys(types),
            **self.recurrent_config(self.recurrent_shape(model, recurrent), recurrent),
        }

    def read_layers(self, config: ConfigJSON, n_layers: int) -> list[str]:
        """The types of the layers."""
        types = config.texts("layer_types")
        if types is None or len(types) != n_layers or set(types) != {_FULL, _LINEAR}:
            raise config.refusal("layer_types", f"must be {_FULL} and {_LINEAR}, of {n_layers} layers")
        return types

    @abstractmethod
    def read_recurrent(self, config: ConfigJSON) -> dict:
        """The recurrent mixer, the inverse of `recurrent_config`."""

    def model(self, config: ConfigJSON) -> dict:
        config.must_be("attention_bias", False, "there are no biases here", default=False)
        config.must_be("hidden_act", "silu", "the feed-forward is swiglu here", default="silu")
        base, fraction, yarn = read_rope(config)
        if yarn is not None:
            raise config.refusal("rope_parameters", "must be default")
        n_layers, n_heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
        if n_heads < 1:
            raise config.refusal("num_attention_heads", "must be at least 1")
        types = self.read_layers(config, n_layers)
        head_dim = config.integer("head_dim", config.integer("hidden_size") // n_heads)
        attention = {
            "type": "attention",
            "n_heads": n_heads,
            "n_kv_heads": config.integer("num_key_value_heads", n_heads),
            "head_dim": head_dim,
            "rope_dim": int(head_dim * fraction),
            "rope_base": base,
            "qk_norm": self.attention.qk_norm,
            "qk_gain": "dim" if self.attention.qk_norm else "head",
        }
        ffn = {"type": "swiglu", "hidden": config.integer("intermediate_size")}
        mixers = {"a": attention, "r": self.read_recurrent(config)}
        return {
            "dim": config.integer("hidden_size"),
            "n_layers": n_layers,
            "pattern": "".join("a" if kind == _FULL else "r" for kind in types),
            "blocks": {name: {"mixer": mixer, "ffn": ffn} for name, mixer in mixers.items()},
            "tie_embeddings": config.flag("tie_word_embeddings", False),
            "norm_eps": config.number("rms_norm_eps", 1e-6),
            "embedding_rms": None,
        }

    @staticmethod
    def gain_rule(ours: str, theirs: str) -> Rule:
        """Of the gain of a norm."""
        return same(ours, theirs)

    @abstractmethod
    def attention_rules(self, ours: str, theirs: str, model: ModelConfig, block: BlockConfig) -> list[Rule]:
        """Of the mixer `ours` of a layer `theirs` with attention."""

    @abstractmethod
    def recurrent_rules(self, ours: str, theirs: str, block: BlockConfig) -> list[Rule]:
        """Of the mixer `ours` of a recurrent layer `theirs`."""

    def rules(self, model):
        rules = [
            same("embedding.weight", "model.embed_tokens.weight"),
            self.gain_rule("head.norm.weight", f"model.{self.final_norm}.weight"),
        ]
        if not model.tie_embeddings:
            rules.append(same("head.weight", "lm_head.weight"))
        for layer, (_, block) in enumerate(layer_blocks(model)):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            rules += [
                self.gain_rule(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight"),
                self.gain_rule(f"{ours}.ffn_norm.weight", f"{theirs}.{self.ffn_norm}.weight"),
                swiglu_rule(f"{ours}.ffn", f"{theirs}.{self.ffn}", hidden_width(model, block)),
                same(f"{ours}.ffn.down.weight", f"{theirs}.{self.ffn}.down_proj.weight"),
            ]
            if block.mixer.type == "attention":
                rules += self.attention_rules(f"{ours}.mixer", theirs, model, block)
            else:
                rules += self.recurrent_rules(f"{ours}.mixer", theirs, block)
        return rules


def taps_rule(ours: str, theirs: str) -> Rule:
    """Taps (K, C) of a causal convolution, the newest input's first, as (C, 1, K), the newest input's last."""
    return Rule(
        ours,
        (theirs,),
        lambda taps_KC: [taps_KC.flip(0).T[:, None]],
        lambda tensors: tensors[0][:, 0].T.flip(0),
    )


class Qwen35(HybridFamily):
    """Gated delta nets, and attention with norms of queries and keys. Its attention has an output gate, which is one
    half where its rows are zero; so that `o_proj` is doubled. Its norms store the gain less one."""

    name, label = "qwen3_5", "Qwen3.5"
    model_type, architecture = "qwen3_5_text", "Qwen3_5ForCausalLM"
    recurrent = "gdn"
    final_norm, ffn_norm, ffn = "norm", "post_attention_layernorm", "mlp"
    attention = SoftmaxFamily(name, label, model_type, architecture, qk_norm=True, partial_rope=True)

    def recurrent_shape(self, model, block):
        mixer = block.mixer
        head_dim = mixer.head_dim or model.dim // mixer.n_heads
        return {
            "mixer.n_heads": mixer.n_heads,
            "mixer.head_dim": head_dim,
            "mixer.value_head_dim": mixer.value_head_dim or head_dim,
            "mixer.conv_size": mixer.conv_size,
        }

    def recurrent_config(self, shape, block):
        return {
            "linear_num_key_heads": shape["mixer.n_heads"],
            "linear_num_value_heads": shape["mixer.n_heads"],
            "linear_key_head_dim": shape["mixer.head_dim"],
            "linear_value_head_dim": shape["mixer.value_head_dim"],
            "linear_conv_kernel_dim": shape["mixer.conv_size"],
            "attn_output_gate": True,
        }

    def read_recurrent(self, config):
        n_heads = config.integer("linear_num_value_heads")
        config.must_be("linear_num_key_heads", n_heads, f"must be linear_num_value_heads={n_heads}")
        return {
            "type": "gdn",
            "n_heads": n_heads,
            "head_dim": config.integer("linear_key_head_dim"),
            "value_head_dim": config.integer("linear_value_head_dim"),
            "conv_size": config.integer("linear_conv_kernel_dim"),
        }

    @staticmethod
    def gain_rule(ours, theirs):
        return _less_one(ours, theirs)

    def attention_rules(self, ours, theirs, model, block):
        return _gated_attention(ours, f"{theirs}.self_attn", attention_shape(model, block))

    def recurrent_rules(self, ours, theirs, block):
        return _delta_net(ours, f"{theirs}.linear_attn", block.mixer.n_heads)


def _less_one(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda gain: [gain - 1], lambda tensors: tensors[0] + 1)


def _gated_attention(ours: str, theirs: str, shape: dict[str, Any]) -> list[Rule]:
    n_heads, n_kv, width = (shape[f"mixer.{key}"] for key in ("n_heads", "n_kv_heads", "head_dim"))
    names = tuple(f"{theirs}.{name}_proj.weight" for name in "qkv")

    def write(qkv: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = qkv.split([n_heads * width, n_kv * width, n_kv * width])
        q = q.unflatten(0, (n_heads, width))
        return [torch.cat([q, torch.zeros_like(q)], dim=1).flatten(0, 1), k, v]

    def read(tensors) -> torch.Tensor:
        q, gate = tensors[0].unflatten(0, (n_heads, 2, width)).unbind(1)
        if gate.any():
            raise ValueError(f"tensor {names[0]!r} has an output gate, which our attention has not")
        return torch.cat([q.flatten(0, 1), *tensors[1:]])

    return [
        Rule(f"{ours}.qkv.weight", names, write, read),
        *(_less_one(f"{ours}.{name}_gain", f"{theirs}.{name}_norm.weight") for name in "qk"),
        Rule(f"{ours}.out.weight", (f"{theirs}.o_proj.weight",), lambda out: [out * 2], lambda tensors: tensors[0] / 2),
    ]


def _delta_net(ours: str, theirs: str, n_heads: int) -> list[Rule]:
    return [
        same(f"{ours}.qkv.weight", f"{theirs}.in_proj_qkv.weight"),
        taps_rule(f"{ours}.conv.weight", f"{theirs}.conv1d.weight"),
        rows(f"{ours}.gates.weight", {f"{theirs}.in_proj_{name}.weight": n_heads for name in "ab"}),
        same(f"{ours}.z.weight", f"{theirs}.in_proj_z.weight"),
        same(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
        same(f"{ours}.out.weight", f"{theirs}.out_proj.weight"),
        same(f"{ours}.log_rate", f"{theirs}.A_log"),
        same(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
    ]


class Bamba(HybridFamily):
    """Mamba 2, and attention without norms of queries and keys."""

    name, label = "bamba", "Bamba"
    model_type, architecture = "bamba", "BambaForCausalLM"
    recurrent = "mamba2"
    final_norm, ffn_norm, ffn = "final_layernorm", "pre_ff_layernorm", "feed_forward"
    attention = SoftmaxFamily(name, label, model_type, architecture, partial_rope=True, free_head_dim=False)

    def recurrent_shape(self, model, block):
        mixer = block.mixer
        head_dim = mixer.head_dim or 2 * model.dim // mixer.n_heads
        keys = ("n_heads", "state_dim", "n_groups", "conv_size")
        return {f"mixer.{key}": getattr(mixer, key) for key in keys} | {"mixer.head_dim": head_dim}

    def recurrent_obstacles(self, where, model, block):
        shape = self.recurrent_shape(model, block)
        inner = shape["mixer.n_heads"] * shape["mixer.head_dim"]
        if inner % model.dim == 0:
            return []
        reason = f"of {self.label} n_heads * head_dim is a multiple of dim={model.dim}, not {inner}"
        return [Obstacle(f"{where}.mixer.head_dim", shape["mixer.head_dim"], reason)]

    def layer_keys(self, types):
        return {"attn_layer_indices": [index for index, kind in enumerate(types) if kind == _FULL]}

    def config(self, model, embedding_scale):
        keys = super().config(model, embedding_scale)
        expand = keys["mamba_n_heads"] * keys["mamba_d_head"] // model.dim
        rope_dim = int(keys["head_dim"] * keys["partial_rotary_factor"])
        return keys | {"mamba_expand": expand, "attn_rotary_emb": rope_dim}

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

    def read_layers(self, config, n_layers):
        full = set(config.integers("attn_layer_indices") or ())
        if not 0 < len(full) < n_layers or not full <= set(range(n_layers)):
            raise config.refusal("attn_layer_indices", f"must be some of {n_layers} layers, and not all")
        return [_FULL if index in full else _LINEAR for index in range(n_layers)]

    def read_recurrent(self, config):
        config.must_be("mamba_conv_bias", False, "there are no biases here", default=True)
        for key in ("mamba_proj_bias", "mlp_bias"):
            config.must_be(key, False, "there are no biases here", default=False)
        if config.has("time_step_limit") and config.tree["time_step_limit"] not in _UNLIMITED:
            raise config.refusal("time_step_limit", "steps are not limited here")
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
        return _mamba2(ours, f"{theirs}.mamba")


def _mamba2(ours: str, theirs: str) -> list[Rule]:
    return [
        same(f"{ours}.project.weight", f"{theirs}.in_proj.weight"),
        taps_rule(f"{ours}.conv.weight", f"{theirs}.conv1d.weight"),
        same(f"{ours}.norm.weight", f"{theirs}.norm.weight"),
        same(f"{ours}.out.weight", f"{theirs}.out_proj.weight"),
        same(f"{ours}.log_rate", f"{theirs}.A_log"),
        same(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
        same(f"{ours}.skip", f"{theirs}.D"),
    ]
