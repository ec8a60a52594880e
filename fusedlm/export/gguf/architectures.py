"""The architectures of llama.cpp that our families are: what stands in the way, metadata and tensors.

Rotary dimensions come in pairs (i, i + R/2) in one group of architectures, as here and in Transformers, and in
adjacent pairs in the other: there rows of queries and keys are reordered. No number changes but the decay rates of
recurrent layers, which are stored as -exp(A_log).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fusedlm.config.model import ModelConfig
from fusedlm.export.families.base import Family, Obstacle, layer_blocks, used_blocks

Tensors = dict[str, torch.Tensor]
SIGMOID = 2  # of scores of experts


@dataclass(frozen=True)
class Architecture:
    """name: of general.architecture. adjacent: whether rotary dimensions come in adjacent pairs.

    keys: metadata from the keys of config.json, without the name of the architecture before them.
    layer: the tensors of a layer from those of the class, by names without their layer.
    """

    name: str
    adjacent: bool
    keys: Callable[[dict], dict[str, Any]]
    layer: Callable[[dict, Tensors], Tensors]


def obstacles(family: Family, model: ModelConfig) -> list[Obstacle]:
    """What llama.cpp has no place for in a model that fits the family."""
    if family.name not in ARCHITECTURES:
        return [Obstacle("family", family.name, f"llama.cpp runs {', '.join(ARCHITECTURES)}")]
    found = []
    for name, block in used_blocks(model).items():
        window = getattr(block.mixer, "window", None)
        if window is not None:
            reason = f"llama.cpp's {ARCHITECTURES[family.name].name} attends to all; set null"
            found.append(Obstacle(f"model.blocks.{name}.mixer.window", window, reason))
    if family.name == "qwen3_5":
        found += _interval_obstacles(model)
    mixers = {block.mixer.type for block in used_blocks(model).values()}
    if family.name in ("nemotron_h", "granitemoehybrid") and (missing := {"mamba2", "attention"} - mixers):
        reason = f"llama.cpp's {ARCHITECTURES[family.name].name} has layers of {missing.pop()} too"
        found.append(Obstacle("model.pattern", model.pattern, reason))
    for name, block in used_blocks(model).items():
        mixer, where = block.mixer, f"model.blocks.{name}.mixer"
        if family.name == "nemotron_h" and block.ffn.type == "moe":
            reason = "experts are not written as llama.cpp's nemotron_h_moe; set relu2"
            found.append(Obstacle(f"model.blocks.{name}.ffn.type", "moe", reason))
        if mixer.type == "mla" and mixer.q_rank is None:
            found.append(Obstacle(f"{where}.q_rank", None, "llama.cpp's deepseek2 has a latent of queries; set it"))
        is_granite = ARCHITECTURES[family.name].name == "granitehybrid"
        if is_granite and mixer.type == "mamba2" and mixer.head_dim not in (None, 2 * model.dim / mixer.n_heads):
            reason = f"in llama.cpp's granitehybrid n_heads * head_dim is 2 * dim = {2 * model.dim}"
            found.append(Obstacle(f"{where}.head_dim", mixer.head_dim, reason))
    return found


def _interval_obstacles(model: ModelConfig) -> list[Obstacle]:
    found = []
    kinds = [block.mixer.type == "attention" for _, block in layer_blocks(model)]
    interval = kinds.index(True) + 1
    if kinds != [(layer + 1) % interval == 0 for layer in range(len(kinds))]:
        reason = "attention must be in every k-th layer, such as gggaggga"
        found.append(Obstacle("model.pattern", model.pattern, reason))
    for name, block in used_blocks(model).items():
        if block.mixer.type == "gdn":
            head_dim = block.mixer.head_dim or model.dim // block.mixer.n_heads
            if (value_dim := block.mixer.value_head_dim or head_dim) != head_dim:
                key = f"model.blocks.{name}.mixer.value_head_dim"
                found.append(Obstacle(key, value_dim, f"must be head_dim={head_dim}"))
    return found


def _basic(config: dict) -> dict[str, Any]:
    """Metadata of all."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config["rope_parameters"]
    keys = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] == "yarn":
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }
    return keys


def _granite(config: dict) -> dict[str, Any]:
    return _basic(config) | _factors(config)


def _factors(config: dict) -> dict[str, Any]:
    """Of Granite."""
    return {
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }


def _phi3(config: dict) -> dict[str, Any]:
    return _basic(config) | {
        "rope.scaling.original_context_length": config["max_position_embeddings"],
    }


def _deepseek2(config: dict) -> dict[str, Any]:
    rank, nope, rope = (config[key] for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"))
    keys = _basic(config) | {
        # Attention to the latents themselves: one key, and as value its leading part.
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": 0,
        "expert_shared_count": 0,
        "expert_weights_scale": 1.0,
        "expert_gating_func": SIGMOID,
    }
    if config["q_lora_rank"] is not None:
        keys["attention.q_lora_rank"] = config["q_lora_rank"]
    if config["rope_parameters"]["rope_type"] == "yarn":
        keys["rope.scaling.yarn_log_multiplier"] = 0.1
    if config["first_k_dense_replace"] < config["num_hidden_layers"]:
        keys |= {
            "expert_count": config["n_routed_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_shared_count": config["n_shared_experts"],
            "expert_weights_scale": config["routed_scaling_factor"],
            "expert_weights_norm": config["norm_topk_prob"],
            "expert_group_count": config["n_group"],
            "expert_group_used_count": config["topk_group"],
        }
    return keys


def _qwen35(config: dict) -> dict[str, Any]:
    heads, width = config["linear_num_value_heads"], config["linear_value_head_dim"]
    keys = _basic(config)
    pairs = keys["rope.dimension_count"] // 2
    return keys | {
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * width,
        "full_attention_interval": config["layer_types"].index("full_attention") + 1,
        # Pairs take turns among three coordinates, which are one number in text. The fourth is not, and has no pair.
        "rope.dimension_sections": [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0],
    }


def _bamba(config: dict) -> dict[str, Any]:
    attention = [i in config["attn_layer_indices"] for i in range(config["num_hidden_layers"])]
    return _granite_hybrid_keys(config, attention, config["attn_rotary_emb"])


def _granite_moe_hybrid(config: dict) -> dict[str, Any]:
    attention = [kind == "attention" for kind in config["layer_types"]]
    rope_dim = config["head_dim"] if config["position_embedding_type"] == "rope" else 0
    return _granite_hybrid_keys(config, attention, rope_dim) | _factors(config)


def _granite_hybrid_keys(config: dict, attention: list[bool], rope_dim: int) -> dict[str, Any]:
    """attention: which layers have it. rope_dim: dimensions of a head that are rotated."""
    heads, width = config["mamba_n_heads"], config["mamba_d_head"]
    keys = _basic(config)
    return keys | {
        "attention.head_count_kv": [config["num_key_value_heads"] if of_layer else 0 for of_layer in attention],
        "ssm.conv_kernel": config["mamba_d_conv"],
        "ssm.state_size": config["mamba_d_state"],
        "ssm.group_count": config["mamba_n_groups"],
        "ssm.time_step_rank": heads,
        "ssm.inner_size": heads * width,
        "rope.scaling.finetuned": rope_dim > 0,  # here: whether there is rotary embedding
        "rope.dimension_count": rope_dim or keys["rope.dimension_count"],
    }


def _mamba2(config: dict) -> dict[str, Any]:
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.time_step_rank": config["num_heads"],
        "ssm.inner_size": config["num_heads"] * config["head_dim"],
        "vocab_size": config["vocab_size"],
    }


def _nemotron_h(config: dict) -> dict[str, Any]:
    layers, head_dim = config["hybrid_override_pattern"], config["head_dim"]
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": len(layers),
        # What a layer is, by these two: neither is of Mamba 2.
        "feed_forward_length": [config["intermediate_size"] if kind == "-" else 0 for kind in layers],
        "attention.head_count_kv": [config["num_key_value_heads"] if kind == "*" else 0 for kind in layers],
        "attention.head_count": config["num_attention_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["layer_norm_epsilon"]),
        # Asked for, and not used.
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "rope.dimension_count": head_dim,
        "ssm.conv_kernel": config["conv_kernel"],
        "ssm.state_size": config["ssm_state_size"],
        "ssm.group_count": config["n_groups"],
        "ssm.time_step_rank": config["mamba_num_heads"],
        "ssm.inner_size": config["mamba_num_heads"] * config["mamba_head_dim"],
        "vocab_size": config["vocab_size"],
    }


_NORMS = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}
_MLP = {f"mlp.{name}_proj.weight": f"ffn_{name}.weight" for name in ("gate", "up", "down")}
_ATTENTION = {
    **{f"self_attn.{name}_proj.weight": f"attn_{name}.weight" for name in "qkv"},
    **{f"self_attn.{name}_norm.weight": f"attn_{name}_norm.weight" for name in "qk"},
    "self_attn.o_proj.weight": "attn_output.weight",
}


def _renamed(names: dict[str, str], layer: Tensors) -> Tensors:
    return {names[name]: tensor for name, tensor in layer.items()}


def _adjacent(weight: torch.Tensor, n_heads: int, rope_dim: int) -> torch.Tensor:
    """Rows of each head with its leading rope_dim dimensions in adjacent pairs."""
    heads = weight.unflatten(0, (n_heads, -1))
    pairs = torch.arange(rope_dim).view(2, -1).T.flatten()
    order = torch.cat([pairs, torch.arange(rope_dim, heads.shape[1])])
    return heads[:, order].flatten(0, 1)


def _llama_layer(config: dict, layer: Tensors) -> Tensors:
    rope_dim = _basic(config)["rope.dimension_count"]
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        key = f"self_attn.{name}_proj.weight"
        layer[key] = _adjacent(layer[key], config[heads], rope_dim)
    return _renamed(_NORMS | _ATTENTION | _MLP, layer)


def _qwen3_layer(config: dict, layer: Tensors) -> Tensors:
    return _renamed(_NORMS | _ATTENTION | _MLP, layer)


def _phi3_layer(config: dict, layer: Tensors) -> Tensors:
    fused = {
        "self_attn.qkv_proj.weight": "attn_qkv.weight",
        "mlp.gate_up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
    }
    return _renamed(_NORMS | _ATTENTION | fused, layer)


def _deepseek2_layer(config: dict, layer: Tensors) -> Tensors:
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    up = layer.pop("self_attn.kv_b_proj.weight").unflatten(0, (heads, -1))
    keys, values = up.split([nope, config["v_head_dim"]], 1)
    found = {"attn_k_b.weight": keys.transpose(1, 2), "attn_v_b.weight": values}
    experts = [name for name in layer if ".experts." in name]
    if experts:
        for name in ("gate", "up", "down"):
            every = [layer.pop(f"mlp.experts.{i}.{name}_proj.weight") for i in range(config["n_routed_experts"])]
            found[f"ffn_{name}_exps.weight"] = torch.stack(every)
    names = {
        "self_attn.q_a_proj.weight": "attn_q_a.weight",
        "self_attn.q_b_proj.weight": "attn_q_b.weight",
        "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
        "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
        "mlp.gate.weight": "ffn_gate_inp.weight",
        "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
        **{f"mlp.shared_experts.{name}_proj.weight": f"ffn_{name}_shexp.weight" for name in ("gate", "up", "down")},
    }
    return found | _renamed(_NORMS | _ATTENTION | _MLP | names, layer)


def _qwen35_layer(config: dict, layer: Tensors) -> Tensors:
    for name in layer:
        if name.endswith("norm.weight") and "linear_attn" not in name:
            layer[name] = layer[name] + 1  # the class holds gains less one
    names = {
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
        "linear_attn.in_proj_z.weight": "attn_gate.weight",
        "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
        "linear_attn.in_proj_b.weight": "ssm_beta.weight",
        **_recurrent("linear_attn"),
    }
    return _renamed(_NORMS | _ATTENTION | _MLP | names, _of_recurrent("linear_attn", layer))


def _bamba_layer(config: dict, layer: Tensors) -> Tensors:
    names = {"pre_ff_layernorm.weight": "ffn_norm.weight"}
    names |= {f"feed_forward.{name}_proj.weight": f"ffn_{name}.weight" for name in ("gate", "up", "down")}
    return _granite_hybrid_layer(config, layer, names, config["attn_rotary_emb"])


def _granite_moe_hybrid_layer(config: dict, layer: Tensors) -> Tensors:
    layer["gate"], layer["up"] = layer.pop("shared_mlp.input_linear.weight").chunk(2)
    names = {"gate": "ffn_gate.weight", "up": "ffn_up.weight", "shared_mlp.output_linear.weight": "ffn_down.weight"}
    rope_dim = config["head_dim"] if config["position_embedding_type"] == "rope" else 0
    return _granite_hybrid_layer(config, layer, names, rope_dim)


def _granite_hybrid_layer(config: dict, layer: Tensors, names: dict[str, str], rope_dim: int) -> Tensors:
    """names: of the feed-forward."""
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        key = f"self_attn.{name}_proj.weight"
        if key in layer:
            layer[key] = _adjacent(layer[key], config[heads], rope_dim)
    names = names | _mamba2_names("mamba")
    return _of_mamba2(_renamed(_NORMS | _ATTENTION | names, _of_recurrent("mamba", layer)), config["mamba_n_groups"])


def _mamba2_layer(config: dict, layer: Tensors) -> Tensors:
    names = {"norm.weight": "attn_norm.weight"} | _mamba2_names("mixer")
    return _of_mamba2(_renamed(names, _of_recurrent("mixer", layer)), config["n_groups"])


def _nemotron_h_layer(config: dict, layer: Tensors) -> Tensors:
    names = {"norm.weight": "attn_norm.weight"}
    names |= {name.replace("self_attn", "mixer"): theirs for name, theirs in _ATTENTION.items()}
    names |= {f"mixer.{name}_proj.weight": f"ffn_{name}.weight" for name in ("up", "down")}
    if "mixer.A_log" not in layer:
        return _renamed(names, layer)
    names |= _mamba2_names("mixer")
    return _of_mamba2(_renamed(names, _of_recurrent("mixer", layer)), config["n_groups"])


def _mamba2_names(part: str) -> dict[str, str]:
    return _recurrent(part) | {f"{part}.in_proj.weight": "ssm_in.weight", f"{part}.D": "ssm_d"}


def _of_mamba2(found: Tensors, n_groups: int) -> Tensors:
    """A layer whose tensors have the shapes of llama.cpp, if it is of Mamba 2."""
    if "ssm_a" in found:
        found["ssm_conv1d.bias"] = torch.zeros(len(found["ssm_conv1d.weight"]))  # which llama.cpp asks for
        found["ssm_norm.weight"] = found["ssm_norm.weight"].unflatten(0, (n_groups, -1))
        found["ssm_a"], found["ssm_d"] = found["ssm_a"][:, None], found["ssm_d"][:, None]
    return found


def _recurrent(part: str) -> dict[str, str]:
    return {
        f"{part}.conv1d.weight": "ssm_conv1d.weight",
        f"{part}.A_log": "ssm_a",
        f"{part}.dt_bias": "ssm_dt.bias",
        f"{part}.norm.weight": "ssm_norm.weight",
        f"{part}.out_proj.weight": "ssm_out.weight",
    }


def _of_recurrent(part: str, layer: Tensors) -> Tensors:
    if f"{part}.A_log" in layer:
        layer[f"{part}.A_log"] = -layer[f"{part}.A_log"].exp()
        layer[f"{part}.conv1d.weight"] = layer[f"{part}.conv1d.weight"].squeeze(1)
    return layer


ARCHITECTURES = {
    "llama": Architecture("llama", True, _basic, _llama_layer),
    "qwen3": Architecture("qwen3", False, _basic, _qwen3_layer),
    "granite": Architecture("granite", True, _granite, _llama_layer),
    "arcee": Architecture("arcee", True, _basic, _llama_layer),
    "phi3": Architecture("phi3", False, _phi3, _phi3_layer),
    "deepseek_v3": Architecture("deepseek2", True, _deepseek2, _deepseek2_layer),
    "qwen3_5": Architecture("qwen35", False, _qwen35, _qwen35_layer),
    "bamba": Architecture("granitehybrid", True, _bamba, _bamba_layer),
    "granitemoehybrid": Architecture("granitehybrid", True, _granite_moe_hybrid, _granite_moe_hybrid_layer),
    "mamba2": Architecture("mamba2", False, _mamba2, _mamba2_layer),
    "nemotron_h": Architecture("nemotron_h", False, _nemotron_h, _nemotron_h_layer),
}


def gguf_tensors(family: Family, config: dict, tensors: Tensors) -> Tensors:
    """All tensors under the names of llama.cpp, their shapes as rows and columns.

    Args:
        config: the content of config.json.
        tensors: of the class.
    """
    architecture = ARCHITECTURES[family.name]
    outer = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    outer |= {f"model.{name}.weight": "output_norm.weight" for name in ("norm", "final_layernorm")}
    outer |= {"backbone.embeddings.weight": "token_embd.weight", "backbone.norm_f.weight": "output_norm.weight"}
    found, layers = {}, [{} for _ in range(config["num_hidden_layers"])]
    for name, tensor in tensors.items():
        if name in outer:
            found[outer[name]] = tensor + 1 if family.name == "qwen3_5" and "norm" in name else tensor
        else:
            _, _, layer, rest = name.split(".", 3)
            layers[int(layer)][rest] = tensor
    for index, layer in enumerate(layers):
        found |= {f"blk.{index}.{name}": tensor for name, tensor in architecture.layer(config, layer).items()}
    return found
