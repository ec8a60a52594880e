"""Latent attention and swiglu: DeepSeek-V3 with dense feed-forwards in all layers."""

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
from fusedlm.export.families.rope import read_rope, rope_keys
from fusedlm.export.families.softmax import hidden_width, swiglu_rule
from fusedlm.export.weights import Rule, reordered, rows, same

_LATENT_EPS = 1e-6  # of the norms of latents, which the class does not read from its configuration


class DeepseekV3(Family):
    """Its rotary dimensions come in interleaved pairs, as other programs expect of it; ours are in halves."""

    name, label = "deepseek_v3", "DeepseekV3"
    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"

    def obstacles(self, model):
        found = wiring_obstacles(model, self.label)
        if types := type_obstacles(model, self.label, ("mla",), ("swiglu",)):
            return found + types
        if model.norm_eps != _LATENT_EPS:
            found.append(
                Obstacle("model.norm_eps", model.norm_eps, f"the norms of {self.label}'s latents have {_LATENT_EPS}")
            )
        shapes = {name: _shape(model, block) for name, block in used_blocks(model).items()}
        found += differing(model, self.label, shapes)
        for name, block in used_blocks(model).items():
            found += self._mixer_obstacles(f"model.blocks.{name}.mixer", block)
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
        block = layer_blocks(model)[0][1]
        mixer, hidden = block.mixer, hidden_width(model, block)
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
            "intermediate_size": hidden,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            # No layer has experts, and there is no prediction of later tokens.
            "first_k_dense_replace": model.n_layers,
            "moe_layer_freq": 1,
            "moe_intermediate_size": hidden,
            "n_routed_experts": 1,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 0,
        } | rope_keys(mixer.rope_base, model.yarn, mscale=True)

    def model(self, config: ConfigJSON) -> dict:
        n_layers = config.integer("num_hidden_layers")
        if config.integer("first_k_dense_replace", 3) < n_layers:
            raise config.refusal("first_k_dense_replace", f"must be at least num_hidden_layers={n_layers}: no experts")
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
        return {
            "dim": config.integer("hidden_size"),
            "n_layers": n_layers,
            "pattern": "m",
            "blocks": {"m": {"mixer": mixer, "ffn": ffn}},
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
            rules.append(swiglu_rule(f"{ours}.ffn", f"{theirs}.mlp", hidden_width(model, block)))
            rules.append(same(f"{ours}.ffn.down.weight", f"{theirs}.mlp.down_proj.weight"))
        return rules


def _shape(model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    mixer = block.mixer
    keys = ("n_heads", "kv_rank", "q_rank", "rope_dim", "rope_base")
    shape = {f"mixer.{key}": getattr(mixer, key) for key in keys}
    head_dim = mixer.head_dim or model.dim // mixer.n_heads
    return shape | {"mixer.head_dim": head_dim, "ffn.hidden": hidden_width(model, block)}


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
