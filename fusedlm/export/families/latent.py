"""Latent attention, with swiglu in the first layers or all, and experts in the others: DeepSeek-V3."""

from typing import Any

import torch

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
from fusedlm.export.families.experts import (
    expert_keys,
    expert_obstacles,
    expert_rules,
    expert_shape,
    read_experts,
)
from fusedlm.export.families.rope import read_rope, rope_keys
from fusedlm.export.families.softmax import hidden_width, swiglu_rule
from fusedlm.export.weights import Rule, reordered, rows, same

_DEFAULTS = {
    "num_experts_per_tok": 8,
    "n_routed_experts": 256,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
_LATENT_EPS = 1e-6  # of the norms of latents, which the class does not read from its configuration


class DeepseekV3(Family):
    """Its rotary dimensions come in interleaved pairs, as other programs expect of it; ours are in halves."""

    name, label = "deepseek_v3", "DeepseekV3"
    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"

    def obstacles(self, model):
        found = wiring_obstacles(model, self.label)
        if types := type_obstacles(model, self.label, ("mla",), ("swiglu", "moe")):
            return found + types
        if model.norm_eps != _LATENT_EPS:
            found.append(
                Obstacle("model.norm_eps", model.norm_eps, f"the norms of {self.label}'s latents have {_LATENT_EPS}")
            )
        used = used_blocks(model)
        found += differing(model, self.label, {name: _shape(model, block) for name, block in used.items()})
        for shape, of_kind in ((_dense_shape, False), (expert_shape, True)):
            shapes = {name: shape(model, block) for name, block in used.items() if _has_experts(block) == of_kind}
            if shapes:
                found += differing(model, self.label, shapes)
        kinds = [_has_experts(block) for _, block in layer_blocks(model)]
        if kinds != sorted(kinds):
            reason = f"in {self.label} layers with experts follow those without"
            found.append(Obstacle("model.pattern", model.pattern, reason))
        for name, block in used.items():
            found += self._mixer_obstacles(f"model.blocks.{name}.mixer", block)
            if _has_experts(block):
                found += expert_obstacles(self.label, f"model.blocks.{name}.ffn", block, "swiglu")
        return found

    def _mixer_obstacles(self, where: str, block: BlockConfig) -> list[Obstacle]:
        mixer, label = block.mixer, self.label
        found = [
            Obstacle(f"{where}.{key}", True, f"{label} has none; set false")
            for key in ("xsa", "value_residual")
            if getattr(mixer, key)
        ]
        if mixer.n_kv_groups not in (None, mixer.n_heads):
            reason = f"each head of {label} has its own up-projection; set null"
            found.append(Obstacle(f"{where}.n_kv_groups", mixer.n_kv_groups, reason))
        if mixer.rope_dim == 0:
            found.append(Obstacle(f"{where}.rope_dim", 0, f"{label} has a rotary part"))
        return found

    def config(self, model, embedding_scale):
        blocks = [block for _, block in layer_blocks(model)]
        mixer = blocks[0].mixer
        dense = [block for block in blocks if not _has_experts(block)]
        experts = [block.ffn for block in blocks if _has_experts(block)]
        head_dim = mixer.head_dim or model.dim // mixer.n_heads
        return {
            "hidden_size": model.dim,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": mixer.n_heads,
            "num_key_value_heads": mixer.n_heads,
            "q_lora_rank": mixer.q_rank,
            "kv_lora_rank": mixer.kv_rank,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": mixer.rope_dim,
            "v_head_dim": head_dim,
            "rope_interleave": True,
            "intermediate_size": hidden_width(model, dense[0]) if dense else experts[0].hidden,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "first_k_dense_replace": len(dense),
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
            **(_expert_keys(experts[0]) if experts else _no_experts(hidden_width(model, dense[0]))),
        } | rope_keys(mixer.rope_base, model.yarn, mscale=True)

    def model(self, config: ConfigJSON) -> dict:
        n_layers = config.integer("num_hidden_layers")
        n_dense = min(config.integer("first_k_dense_replace", 3), n_layers)
        if n_dense < 0:
            raise config.refusal("first_k_dense_replace", "must be at least 0")
        config.must_be("attention_bias", False, "there are no biases here", default=False)
        config.must_be("hidden_act", "silu", "the feed-forward is swiglu here", default="silu")
        config.must_be("rms_norm_eps", _LATENT_EPS, "all norms have that of the latents here", default=_LATENT_EPS)
        config.must_be("rope_interleave", True, "rotary dimensions come in interleaved pairs here", default=True)
        head_dim = config.integer("qk_nope_head_dim", 128)
        config.must_be("v_head_dim", head_dim, f"must be qk_nope_head_dim={head_dim}", default=128)
        base, _, yarn = read_rope(config, mscale=True)
        mixer = {
            "type": "mla",
            "n_heads": config.integer("num_attention_heads"),
            "head_dim": head_dim,
            "kv_rank": config.integer("kv_lora_rank", 512),
            "q_rank": config.integer("q_lora_rank", None),
            "rope_dim": config.integer("qk_rope_head_dim", 64),
            "rope_base": base,
        }
        ffn = {"type": "swiglu", "hidden": config.integer("intermediate_size")}
        blocks = {"m": {"mixer": mixer, "ffn": ffn}} if n_dense else {}
        if n_dense < n_layers:
            config.must_be("scoring_func", "sigmoid", "scores are sigmoids here", default="sigmoid")
            config.must_be("moe_layer_freq", 1, "all later layers have experts here", default=1)
            blocks["e"] = {"mixer": mixer, "ffn": read_experts(config, _DEFAULTS, "swiglu")}
        return {
            "dim": config.integer("hidden_size"),
            "n_layers": n_layers,
            "pattern": "m" * n_dense + "e" * (n_layers - n_dense) if n_dense < n_layers else "m",
            "blocks": blocks,
            "tie_embeddings": config.flag("tie_word_embeddings", False),
            "norm_eps": _LATENT_EPS,
            "embedding_rms": None,
            "yarn": yarn,
        }

    def rules(self, model):
        rules = outer_rules(model)
        for layer, (_, block) in enumerate(layer_blocks(model)):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            rules += norm_rules(layer)
            rules += _attention_rules(f"{ours}.mixer", f"{theirs}.self_attn", model, block)
            if _has_experts(block):
                rules += expert_rules(f"{ours}.ffn", f"{theirs}.mlp", block)
            else:
                rules += _swiglu_rules(f"{ours}.ffn", f"{theirs}.mlp", hidden_width(model, block))
        return rules


def _shape(model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    mixer = block.mixer
    keys = ("n_heads", "kv_rank", "q_rank", "rope_dim", "rope_base")
    shape = {f"mixer.{key}": getattr(mixer, key) for key in keys}
    return shape | {"mixer.head_dim": mixer.head_dim or model.dim // mixer.n_heads}


def _has_experts(block: BlockConfig) -> bool:
    """One without routed experts is a swiglu of another width."""
    return block.ffn.type == "moe"


def _dense_shape(model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    return {"ffn.hidden": hidden_width(model, block)}


def _expert_keys(ffn) -> dict[str, Any]:
    return expert_keys(ffn) | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _no_experts(hidden: int) -> dict[str, Any]:
    """Keys that the class wants all the same."""
    ones = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group")
    return {"moe_intermediate_size": hidden} | dict.fromkeys(ones, 1)


def _swiglu_rules(ours: str, theirs: str, hidden: int) -> list[Rule]:
    return [swiglu_rule(ours, theirs, hidden), same(f"{ours}.down.weight", f"{theirs}.down_proj.weight")]


def _attention_rules(ours: str, theirs: str, model: ModelConfig, block: BlockConfig) -> list[Rule]:
    mixer = block.mixer
    n_heads, rope = mixer.n_heads, mixer.rope_dim
    head_dim = mixer.head_dim or model.dim // n_heads
    pairs = torch.arange(rope).view(2, -1).T.flatten()  # dimension i of theirs is dimension pairs[i] of ours
    down_rows = torch.cat([torch.arange(mixer.kv_rank), mixer.kv_rank + pairs])
    head = torch.cat([torch.arange(head_dim), head_dim + pairs])
    q_rows = (torch.arange(n_heads)[:, None] * (head_dim + rope) + head).flatten()
    # Ours has the keys of all heads, then the values of all; theirs the key and the value of each head.
    k_rows = torch.arange(n_heads * head_dim).view(n_heads, head_dim)
    kv_rows = torch.cat([k_rows, k_rows + n_heads * head_dim], dim=1).flatten()
    rules = [
        reordered(f"{ours}.q_up.weight", f"{theirs}.{'q_proj' if mixer.q_rank is None else 'q_b_proj'}.weight", q_rows),
        same(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight"),
        reordered(f"{ours}.kv_up.weight", f"{theirs}.kv_b_proj.weight", kv_rows),
        same(f"{ours}.out.weight", f"{theirs}.o_proj.weight"),
    ]
    down, kv_down = f"{ours}.down.weight", f"{theirs}.kv_a_proj_with_mqa.weight"
    if mixer.q_rank is None:
        return [reordered(down, kv_down, down_rows), *rules]
    q_down = rows(down, {f"{theirs}.q_a_proj.weight": mixer.q_rank, kv_down: mixer.kv_rank + rope})
    kv_only = reordered("", "", down_rows)
    return [
        Rule(
            down,
            q_down.theirs,
            lambda tensor: [(parts := q_down.write(tensor))[0], *kv_only.write(parts[1])],
            lambda tensors: q_down.read([tensors[0], kv_only.read([tensors[1]])]),
        ),
        same(f"{ours}.q_norm.weight", f"{theirs}.q_a_layernorm.weight"),
        *rules,
    ]
