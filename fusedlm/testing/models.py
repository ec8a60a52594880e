"""Small models of every part, for the laws. A mixer or feed-forward without a case here fails a test."""

import torch
import yaml

from fusedlm.config.model import BlockConfig, ModelConfig
from fusedlm.model import Decoder, build_model

MIXER_CASES = {
    "attention": [
        "{type: attention, n_heads: 4}",
        "{type: attention, n_heads: 4, n_kv_heads: 2, rope_dim: 4}",
        "{type: attention, n_heads: 2, rope_dim: 0, qk_norm: false}",
        "{type: attention, n_heads: 4, n_kv_heads: 1, window: 5}",
        "{type: attention, n_heads: 2, window: 2}",
        "{type: attention, n_heads: 4, n_kv_heads: 2, xsa: true, value_residual: true}",
        "{type: attention, n_heads: 4, n_kv_heads: 2, rope_dim: 6, qk_gain: dim}",
        "{type: attention, n_heads: 2, window: 5, xsa: true, value_residual: true}",
        "{type: attention, n_heads: 4, n_kv_heads: 2, xsa: true, output_gate: true}",
        "{type: attention, n_heads: 2, qk_gain: none}",
    ],
    "mla": [
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 4}",
        "{type: mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6, n_kv_groups: 2, head_dim: 10}",
        "{type: mla, n_heads: 2, kv_rank: 8, rope_dim: 0}",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 4, n_kv_groups: 2, xsa: true, value_residual: true}",
    ],
    "diff_mla": [
        "{type: diff_mla, n_heads: 4, kv_rank: 12, rope_dim: 4}",
        "{type: diff_mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6, n_kv_groups: 2, head_dim: 10}",
        "{type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 0, lambda_form: token}",
        "{type: diff_mla, n_heads: 2, kv_rank: 8, rope_dim: 4, lambda_init: 0.5, xsa: true, value_residual: true}",
    ],
    "cmd_mla": [
        "{type: cmd_mla, n_heads: 4, kv_rank: 12, rope_dim: 4}",
        "{type: cmd_mla, n_heads: 4, kv_rank: 12, q_rank: 20, rope_dim: 6, n_kv_groups: 2, head_dim: 10, noise_dim: 6}",
        "{type: cmd_mla, n_heads: 2, kv_rank: 8, rope_dim: 0, lambda_init: 0.5, xsa: true, value_residual: true}",
    ],
    "gdn": [
        "{type: gdn, n_heads: 2, chunk_size: 8}",
        "{type: gdn, n_heads: 4, head_dim: 6, value_head_dim: 10, conv_size: 2, chunk_size: 16}",
        "{type: gdn, n_heads: 1, conv_size: 1}",
    ],
    "sdla": [
        "{type: sdla, n_heads: 4, rope_dim: 4, chunk_size: 8}",
        "{type: sdla, n_heads: 2, head_dim: 6, rank: 10, rope_dim: 6, lambda_init: 0.5, chunk_size: 7}",
        "{type: sdla, n_heads: 2, rope_dim: 0, chunk_size: 16}",
        "{type: sdla, n_heads: 1, rope_dim: 2, memory: false}",
    ],
    "mamba2": [
        "{type: mamba2, n_heads: 4, state_dim: 8, chunk_size: 8}",
        "{type: mamba2, n_heads: 4, head_dim: 6, state_dim: 10, n_groups: 2, conv_size: 2, chunk_size: 7}",
        "{type: mamba2, n_heads: 3, head_dim: 8, state_dim: 5, n_groups: 3, conv_size: 1}",
    ],
}
FFN_CASES = {
    "swiglu": ["{type: swiglu}", "{type: swiglu, hidden: 40}"],
    "relu2": ["{type: relu2}", "{type: relu2, slope: 0.5, hidden: 48}"],
    "routed": ["{type: routed}", "{type: routed, hidden: 40, light: 0.5, low: 0.6, high: 0.8, n_classes: 3}"],
    "moe": [
        "{type: moe, n_experts: 8, top_k: 2, hidden: 16, sequence_loss: 0.001, z_loss: 0.001}",
        "{type: moe, n_experts: 12, top_k: 3, hidden: 10, n_shared: 2, activation: relu2, slope: 0.5, n_groups: 4, "
        "n_limited_groups: 2, routed_scaling: 2.5}",
        "{type: moe, n_experts: 3, top_k: 1, hidden: 24, n_shared: 0}",
        "{type: moe, n_experts: 0, top_k: 2, hidden: 16}",
    ],
}
NO_FFN = "{type: none}"  # a block of a mixer alone


def part_model(
    mixer: str, ffn: str = "{type: swiglu, hidden: 48}", vocab_size: int = 61, extra: str = "", seed: int = 0
) -> Decoder:
    """The model of `part_config`, with the same weights in every process and order of tests."""
    return build_model(part_config(mixer, ffn, extra), vocab_size=vocab_size, seed=seed)


def part_config(mixer: str, ffn: str = "{type: swiglu, hidden: 48}", extra: str = "") -> ModelConfig:
    """Two layers of width 32 of one mixer and feed-forward, given as YAML; extra holds further model keys."""
    block = f"{{mixer: {mixer}, ffn: {ffn}}}"
    tree = f"{{dim: 32, n_layers: 2, pattern: a, blocks: {{a: {block}}}, {extra}}}"
    return ModelConfig.model_validate(yaml.safe_load(tree))


WIRING = {
    "bigram": {"rows": 17, "dim": 6},
    "smear": True,
    "x0_mixing": True,
    "unet_skips": True,
    "depth_scaled_norms": True,
    "init": "orthogonal",
    "tie_embeddings": False,
    "logit_rescale": {"scale": 23.0, "shift": 5.0, "width": 7.5},
}


def wired_config(pattern: str = "avg", **changes) -> ModelConfig:
    """Layers of width 32 with all that stands between embedding, blocks and head, and attention with its value options;
    changes are of model keys."""
    options = "n_heads: 4, n_kv_heads: 2, rope_dim: 4, xsa: true, value_residual: true"
    blocks = {
        "a": f"{{mixer: {{type: attention, {options}}}, ffn: {{type: relu2, slope: 0.5, hidden: 40}}}}",
        "v": f"{{mixer: {{type: attention, {options}, value_embedding: 6}}, ffn: {{type: swiglu, hidden: 40}}}}",
        "g": "{mixer: {type: gdn, n_heads: 2, chunk_size: 8}, ffn: {type: relu2, hidden: 40}}",
    }
    tree = {
        "dim": 32,
        "n_layers": len(pattern),
        "pattern": pattern,
        "blocks": {name: yaml.safe_load(blocks[name]) for name in sorted(set(pattern))},
    }
    return ModelConfig.model_validate(tree | WIRING | changes)


def every_mixer_config(**changes) -> ModelConfig:
    """Four layers of width 32: attention with grouped queries, gdn, attention with a window, mla."""
    blocks = {
        "a": "{mixer: {type: attention, n_heads: 2, n_kv_heads: 1}, ffn: {type: swiglu, hidden: 32}}",
        "g": "{mixer: {type: gdn, n_heads: 2, chunk_size: 16}, ffn: {type: relu2, hidden: 32}}",
        "w": "{mixer: {type: attention, n_heads: 2, window: 9}, ffn: {type: relu2, hidden: 32}}",
        "m": "{mixer: {type: mla, n_heads: 2, kv_rank: 8, rope_dim: 8}, ffn: {type: swiglu, hidden: 32}}",
    }
    return ModelConfig(
        dim=32,
        n_layers=4,
        pattern="".join(blocks),
        blocks={name: BlockConfig.model_validate(yaml.safe_load(block)) for name, block in blocks.items()},
        **changes,
    )


def randomise_(model: torch.nn.Module, scale: float = 0.2, seed: int = 0) -> torch.nn.Module:
    """Add noise to every parameter: projections that start at zero would hide what a block computes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(scale * noise * (parameter.abs().mean() if parameter.dim() < 2 else 1.0))
    return model
