"""Families of recurrent layers and layers of softmax attention, all with swiglu: what they share, and Qwen3.5."""

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

FULL, LINEAR = "full_attention", "linear_attention"


class HybridFamily(Family):
    """One kind of recurrent layer and one of attention, in any order.

    Attributes:
        recurrent: type of the recurrent mixer. attention: what its attention has.
        needs_attention: whether some layers must have it.
        final_norm, ffn_norm, ffn: what the class calls the last norm, and in a layer the second norm and feed-forward.
    """

    recurrent: str
    attention: SoftmaxFamily
    needs_attention = True
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
            elif kind != "attention" or self.needs_attention:
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
        recurrent = blocks[self.recurrent]
        shape = attention_shape(model, blocks["attention"]) if "attention" in blocks else _no_attention(model)
        fraction = rope_fraction(shape["mixer.rope_dim"], shape["mixer.head_dim"])
        types = [FULL if block.mixer.type == "attention" else LINEAR for _, block in layer_blocks(model)]
        return {
            "hidden_size": model.dim,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": shape["mixer.n_heads"],
            "num_key_value_heads": shape["mixer.n_kv_heads"],
            "head_dim": shape["mixer.head_dim"],
            "intermediate_size": hidden_width(model, recurrent),
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
        if types is None or len(types) != n_layers or set(types) != {FULL, LINEAR}:
            raise config.refusal("layer_types", f"must be {FULL} and {LINEAR}, of {n_layers} layers")
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
            "output_gate": self.attention.output_gate,
        }
        ffn = {"type": "swiglu", "hidden": config.integer("intermediate_size")}
        mixers = {FULL: attention, LINEAR: self.read_recurrent(config)}
        return {
            "dim": config.integer("hidden_size"),
            "n_layers": n_layers,
            "pattern": "".join(_LETTERS[kind] for kind in types),
            "blocks": {_LETTERS[kind]: {"mixer": mixers[kind], "ffn": ffn} for kind in sorted(set(types))},
            "tie_embeddings": config.flag("tie_word_embeddings", False),
            "norm_eps": config.number("rms_norm_eps", 1e-6),
            "embedding_rms": None,
        }

    @staticmethod
    def gain_rule(ours: str, theirs: str) -> Rule:
        """Of the gain of a norm."""
        return same(ours, theirs)

    def ffn_rules(self, ours: str, theirs: str, hidden: int) -> list[Rule]:
        """Of the feed-forward `ours` of a layer, `theirs`."""
        return [swiglu_rule(ours, theirs, hidden), same(f"{ours}.down.weight", f"{theirs}.down_proj.weight")]

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
                *self.ffn_rules(f"{ours}.ffn", f"{theirs}.{self.ffn}", hidden_width(model, block)),
            ]
            if block.mixer.type == "attention":
                rules += self.attention_rules(f"{ours}.mixer", theirs, model, block)
            else:
                rules += self.recurrent_rules(f"{ours}.mixer", theirs, block)
        return rules


_LETTERS = {FULL: "a", LINEAR: "r"}


def _no_attention(model: ModelConfig) -> dict[str, Any]:
    """What config.json says of attention that no layer has: one head."""
    ones = {"mixer.n_heads": 1, "mixer.n_kv_heads": 1, "mixer.rope_base": 10_000.0}
    return ones | {"mixer.head_dim": model.dim, "mixer.rope_dim": model.dim}


def taps_rule(ours: str, theirs: str) -> Rule:
    """Taps (K, C) of a causal convolution, the newest input's first, as (C, 1, K), the newest input's last."""
    return Rule(
        ours,
        (theirs,),
        lambda taps_KC: [taps_KC.flip(0).T[:, None]],
        lambda tensors: tensors[0][:, 0].T.flip(0),
    )


class Qwen35(HybridFamily):
    """Gated delta nets, and attention with norms of queries and keys. Its attention has an output gate; that of ours
    without one has rows of zero, so that it is one half, and `o_proj` is doubled. Its norms store the gain less one."""

    name, label = "qwen3_5", "Qwen3.5"
    model_type, architecture = "qwen3_5_text", "Qwen3_5ForCausalLM"
    recurrent = "gdn"
    final_norm, ffn_norm, ffn = "norm", "post_attention_layernorm", "mlp"
    attention = SoftmaxFamily(name, label, model_type, architecture, qk_norm=True, rope="part", output_gate=True)

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
        names = ours, f"{theirs}.self_attn"
        return _gated_attention(*names, attention_shape(model, block), block.mixer.output_gate)

    def recurrent_rules(self, ours, theirs, block):
        return _delta_net(ours, f"{theirs}.linear_attn", block.mixer.n_heads)


def _less_one(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda gain: [gain - 1], lambda tensors: tensors[0] + 1)


def _gated_attention(ours: str, theirs: str, shape: dict[str, Any], has_gate: bool) -> list[Rule]:
    """has_gate: whether ours has an output gate."""
    n_heads, n_kv, width = (shape[f"mixer.{key}"] for key in ("n_heads", "n_kv_heads", "head_dim"))
    names = tuple(f"{theirs}.{name}_proj.weight" for name in "qkv")

    def write(qkv: torch.Tensor) -> list[torch.Tensor]:
        q, k, v, *gate = qkv.split([n * width for n in (n_heads, n_kv, n_kv, *[n_heads] * has_gate)])
        gate = gate[0] if has_gate else torch.zeros_like(q)
        return [torch.cat([x.unflatten(0, (n_heads, width)) for x in (q, gate)], dim=1).flatten(0, 1), k, v]

    def read(tensors) -> torch.Tensor:
        q, gate = (x.flatten(0, 1) for x in tensors[0].unflatten(0, (n_heads, 2, width)).unbind(1))
        if not has_gate and gate.any():
            raise ValueError(f"tensor {names[0]!r} has an output gate, and the recipe has not")
        return torch.cat([q, *tensors[1:], *[gate] * has_gate])

    out = f"{ours}.out.weight", f"{theirs}.o_proj.weight"
    doubled = Rule(out[0], (out[1],), lambda weight: [weight * 2], lambda tensors: tensors[0] / 2)
    return [
        Rule(f"{ours}.qkv.weight", names, write, read),
        *(_less_one(f"{ours}.{name}_gain", f"{theirs}.{name}_norm.weight") for name in "qk"),
        same(*out) if has_gate else doubled,
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
