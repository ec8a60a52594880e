"""The experts of DeepSeek-V3, which other classes have too: keys of config.json, and tensors."""

from typing import Any

import torch

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.export.config_json import ConfigJSON
from fusedlm.export.families.base import Obstacle
from fusedlm.export.families.softmax import swiglu_rule
from fusedlm.export.weights import Rule, same


def expert_obstacles(label: str, where: str, block: BlockConfig, activation: str) -> list[Obstacle]:
    """Of a block with experts.

    Args:
        where: the key of its feed-forward.
        activation: the kind of experts that the class has.
    """
    ffn = block.ffn
    found = []
    if ffn.activation != activation:
        found.append(Obstacle(f"{where}.activation", ffn.activation, f"the experts of {label} are {activation}"))
    if ffn.n_shared == 0:
        found.append(Obstacle(f"{where}.n_shared", 0, f"{label} has shared experts; set 1 or more"))
    if ffn.n_experts < 2 * ffn.n_groups:
        reason = f"a group of {label} has two experts or more, and there are {ffn.n_groups}"
        found.append(Obstacle(f"{where}.n_experts", ffn.n_experts, reason))
    return found


def expert_shape(model: ModelConfig, block: BlockConfig) -> dict[str, Any]:
    """What a layer of experts is, by key."""
    keys = ("n_experts", "top_k", "hidden", "n_shared", "n_groups", "routed_scaling")
    limit = block.ffn.n_limited_groups or block.ffn.n_groups
    return {f"ffn.{key}": getattr(block.ffn, key) for key in keys} | {"ffn.n_limited_groups": limit}


def expert_keys(ffn) -> dict[str, Any]:
    """Keys of config.json."""
    return {
        "moe_intermediate_size": ffn.hidden,
        "n_routed_experts": ffn.n_experts,
        "n_shared_experts": ffn.n_shared,
        "num_experts_per_tok": ffn.top_k,
        "n_group": ffn.n_groups,
        "topk_group": ffn.n_limited_groups or ffn.n_groups,
        "norm_topk_prob": ffn.top_k > 1,  # of one expert the score itself is the weight
        "routed_scaling_factor": ffn.routed_scaling,
    }


def read_experts(config: ConfigJSON, defaults: dict[str, Any], activation: str) -> dict[str, Any]:
    """The feed-forward, the inverse of `expert_keys`.

    Args:
        defaults: of the class, by the keys of config.json.

    Raises:
        ValueError: ours have no such weights; names the key.
    """
    top_k = config.integer("num_experts_per_tok", defaults["num_experts_per_tok"])
    config.must_be("norm_topk_prob", top_k > 1, f"must be {str(top_k > 1).lower()} of {top_k} experts", default=True)
    integers = {
        "n_experts": "n_routed_experts",
        "hidden": "moe_intermediate_size",
        "n_shared": "n_shared_experts",
        "n_groups": "n_group",
        "n_limited_groups": "topk_group",
    }
    return {
        "type": "moe",
        "activation": activation,
        "top_k": top_k,
        "routed_scaling": config.number("routed_scaling_factor", defaults["routed_scaling_factor"]),
        **{ours: config.integer(theirs, defaults[theirs]) for ours, theirs in integers.items()},
    }


def expert_rules(ours: str, theirs: str, block: BlockConfig) -> list[Rule]:
    """Of the feed-forward `ours` of a layer, `theirs`."""
    ffn = block.ffn
    is_gated = ffn.activation == "swiglu"
    parts = ("gate", "up") if is_gated else ("up",)
    experts = [f"{theirs}.experts.{i}" for i in range(ffn.n_experts)]
    shared = f"{ours}.shared", f"{theirs}.shared_experts"
    up = same(f"{shared[0]}.up.weight", f"{shared[1]}.up_proj.weight")
    return [
        swiglu_rule(*shared, ffn.hidden * ffn.n_shared) if is_gated else up,
        same(f"{shared[0]}.down.weight", f"{shared[1]}.down_proj.weight"),
        same(f"{ours}.router.project.weight", f"{theirs}.gate.weight"),
        same(f"{ours}.router.bias", f"{theirs}.gate.e_score_correction_bias"),
        Rule(
            f"{ours}.experts.up",
            tuple(f"{expert}.{name}_proj.weight" for expert in experts for name in parts),
            lambda up: [part for expert in up for part in expert.chunk(len(parts))],
            lambda found: torch.cat(list(found)).unflatten(0, (ffn.n_experts, -1)),
        ),
        Rule(
            f"{ours}.experts.down",
            tuple(f"{expert}.down_proj.weight" for expert in experts),
            lambda down: list(down.unbind()),
            torch.stack,
        ),
    ]
