"""A recipe for each family, small, with options that the mapping has to get right."""

import yaml

from fusedlm.config.model import ModelConfig

GROUPED = "n_heads: 4, n_kv_heads: 2, head_dim: 8, qk_norm: false"
GROUPED_MAMBA = "{type: mamba2, n_heads: 4, head_dim: 6, state_dim: 8, n_groups: 2}"
SWIGLU = "{type: swiglu, hidden: 48}"
UNTIED = "tie_embeddings: false, norm_eps: 1.0e-5"
YARN = "yarn: {factor: 4.0, trained_length: 32}"

# name: (family, mixer and feed-forward of block a, other keys of the model and further blocks by their letter)
CASES = {
    "llama": ("llama", f"{{type: attention, {GROUPED}, rope_base: 5000.0}}", SWIGLU, UNTIED),
    "llama-wide-heads": ("llama", "{type: attention, n_heads: 2, head_dim: 24, qk_norm: false}", SWIGLU, UNTIED),
    "llama-tied": ("llama", f"{{type: attention, {GROUPED}}}", SWIGLU, "embedding_rms: null"),
    "llama-yarn": ("llama", f"{{type: attention, {GROUPED}}}", SWIGLU, f"{UNTIED}, {YARN}"),
    "llama-scaled-norms": ("llama", f"{{type: attention, {GROUPED}}}", SWIGLU, f"{UNTIED}, depth_scaled_norms: true"),
    "llama-mup": (
        "llama",
        f"{{type: attention, {GROUPED}}}",
        SWIGLU,
        f"{UNTIED}, mup: {{base_width: 16, base: {{blocks.a.mixer.head_dim: 4}}, base_depth: 1}}",
    ),
    "mistral": ("mistral", f"{{type: attention, {GROUPED}, window: 7}}", SWIGLU, UNTIED),
    "mistral-tied": ("mistral", f"{{type: attention, {GROUPED}, window: 7}}", SWIGLU, ""),
    "qwen3": ("qwen3", "{type: attention, n_heads: 4, n_kv_heads: 2, head_dim: 6, qk_gain: dim}", SWIGLU, UNTIED),
    "qwen3-window": (
        "qwen3",
        "{type: attention, n_heads: 4, qk_gain: dim}",
        SWIGLU,
        "pattern: aab, b: {mixer: {type: attention, n_heads: 4, qk_gain: dim, window: 6}, "
        "ffn: {type: swiglu, hidden: 48}}",
    ),
    "qwen3-mup": (
        "qwen3",
        "{type: attention, n_heads: 4, qk_gain: dim}",
        SWIGLU,
        f"{UNTIED}, mup: {{base_width: 16}}",
    ),
    "granite": ("granite", f"{{type: attention, {GROUPED}}}", SWIGLU, ""),
    "granite-yarn": ("granite", f"{{type: attention, {GROUPED}}}", SWIGLU, YARN),
    "arcee": ("arcee", f"{{type: attention, {GROUPED}}}", "{type: relu2, hidden: 48}", UNTIED),
    "arcee-tied": ("arcee", f"{{type: attention, {GROUPED}}}", "{type: relu2}", ""),
    "phi3": ("phi3", f"{{type: attention, {GROUPED}, rope_dim: 4}}", SWIGLU, UNTIED),
    "phi3-window": ("phi3", f"{{type: attention, {GROUPED}, rope_dim: 6, window: 5}}", SWIGLU, ""),
    "nanochat": (
        "nanochat",
        "{type: attention, n_heads: 4, n_kv_heads: 2, qk_gain: none, rope_base: 500.0}",
        "{type: relu2, hidden: 40}",
        f"{UNTIED}, embedding_norm: true, norm_gain: false, logit_softcap: 15.0",
    ),
    "nanochat-tied": (
        "nanochat",
        "{type: attention, n_heads: 2, qk_gain: none}",
        "{type: relu2}",
        "embedding_norm: true, norm_gain: false",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6}",
        SWIGLU,
        "tie_embeddings: false",
    ),
    "deepseek_v3-q_rank": (
        "deepseek_v3",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6, q_rank: 20, head_dim: 10}",
        SWIGLU,
        YARN,
    ),
    "qwen3_5": (
        "qwen3_5",
        "{type: attention, n_heads: 4, n_kv_heads: 2, head_dim: 16, rope_dim: 4, qk_gain: dim}",
        SWIGLU,
        f"{UNTIED}, pattern: gag, g: {{mixer: {{type: gdn, n_heads: 2}}, ffn: {SWIGLU}}}",
    ),
    "qwen3_5-tied": (
        "qwen3_5",
        "{type: attention, n_heads: 4, qk_gain: dim}",
        SWIGLU,
        "pattern: agg, g: {mixer: {type: gdn, n_heads: 4, head_dim: 6, value_head_dim: 10, conv_size: 2}, "
        "ffn: {type: swiglu, hidden: 48}}",
    ),
    "bamba": (
        "bamba",
        f"{{type: attention, {GROUPED}, rope_dim: 4}}",
        SWIGLU,
        f"{UNTIED}, pattern: mam, m: {{mixer: {{type: mamba2, n_heads: 4, state_dim: 8}}, ffn: {SWIGLU}}}",
    ),
    "bamba-groups": (
        "bamba",
        f"{{type: attention, {GROUPED}, rope_dim: 6}}",
        SWIGLU,
        "pattern: amm, m: {mixer: {type: mamba2, n_heads: 4, head_dim: 8, n_groups: 2, conv_size: 3, chunk_size: 16}, "
        "ffn: {type: swiglu, hidden: 48}}",
    ),
    "qwen3_5-gate": (
        "qwen3_5",
        "{type: attention, n_heads: 4, n_kv_heads: 2, head_dim: 16, qk_gain: dim, output_gate: true}",
        SWIGLU,
        f"{UNTIED}, pattern: gbga, g: {{mixer: {{type: gdn, n_heads: 2}}, ffn: {SWIGLU}}}, "
        "b: {mixer: {type: attention, n_heads: 4, n_kv_heads: 2, head_dim: 16, qk_gain: dim}, "
        f"ffn: {SWIGLU}}}",
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        f"{{type: attention, {GROUPED}, rope_dim: 0}}",
        SWIGLU,
        f"pattern: mam, m: {{mixer: {{type: mamba2, n_heads: 4, state_dim: 8}}, ffn: {SWIGLU}}}",
    ),
    "granitemoehybrid-rope": (
        "granitemoehybrid",
        f"{{type: attention, {GROUPED}, rope_base: 500.0}}",
        SWIGLU,
        "pattern: amm, m: {mixer: {type: mamba2, n_heads: 4, head_dim: 16, n_groups: 2, conv_size: 3, chunk_size: 16}, "
        "ffn: {type: swiglu, hidden: 48}}",
    ),
    "granitemoehybrid-recurrent": (
        "granitemoehybrid",
        "{type: mamba2, n_heads: 4, state_dim: 8}",
        SWIGLU,
        UNTIED,
    ),
    "nemotron_h": (
        "nemotron_h",
        f"{{type: attention, {GROUPED}, rope_dim: 0}}",
        "{type: relu2, hidden: 40}",
        f"{UNTIED}, n_layers: 5, pattern: mdaca, m: {{mixer: {GROUPED_MAMBA}, ffn: {{type: none}}}}, "
        f"d: {{mixer: {GROUPED_MAMBA}, ffn: {{type: relu2, hidden: 40}}}}, "
        f"c: {{mixer: {{type: attention, {GROUPED}, rope_dim: 0}}, ffn: {{type: none}}}}",
    ),
    "nemotron_h-moe": (
        "nemotron_h",
        "{type: mamba2, n_heads: 4, state_dim: 8}",
        "{type: moe, activation: relu2, n_experts: 8, top_k: 3, hidden: 16, n_shared: 2, n_groups: 4, "
        "n_limited_groups: 2, routed_scaling: 2.5}",
        "tie_embeddings: false, pattern: ab, "
        "b: {mixer: {type: attention, n_heads: 2, head_dim: 24, rope_dim: 0, qk_norm: false}, ffn: {type: relu2}}",
    ),
    "mamba2": ("mamba2", "{type: mamba2, n_heads: 4, state_dim: 8, chunk_size: 16}", "{type: none}", ""),
    "mamba2-groups": (
        "mamba2",
        "{type: mamba2, n_heads: 4, head_dim: 8, state_dim: 10, n_groups: 2, conv_size: 3}",
        "{type: none}",
        f"{UNTIED}, depth_scaled_norms: true, mup: {{base_width: 16, base_depth: 1}}",
    ),
    "deepseek_v3-mtp": (
        "deepseek_v3",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6}",
        SWIGLU,
        "tie_embeddings: false, mtp: {depth: 2}",
    ),
    "deepseek_v3-moe": (
        "deepseek_v3",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6, q_rank: 20}",
        SWIGLU,
        f"{UNTIED.partition(',')[0]}, pattern: aee, "
        "e: {mixer: {type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6, q_rank: 20}, ffn: {type: moe, n_experts: 8, "
        "top_k: 3, hidden: 16, n_shared: 2, n_groups: 4, n_limited_groups: 2, routed_scaling: 2.5}}",
    ),
    "deepseek_v3-one-expert": (
        "deepseek_v3",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6, q_rank: 20}",
        "{type: moe, n_experts: 5, top_k: 1, hidden: 24}",
        "mup: {base_width: 16, base_depth: 1}",
    ),
    "deepseek_v3-mup": (
        "deepseek_v3",
        "{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6, q_rank: 20}",
        SWIGLU,
        "mup: {base_width: 16}",
    ),
}


def model_config(name: str) -> ModelConfig:
    """The model section of a case."""
    _, mixer, ffn, extra = CASES[name]
    tree = {"dim": 32, "n_layers": 3, "pattern": "a"} | yaml.safe_load(f"{{{extra}}}")
    blocks = {"a": {"mixer": yaml.safe_load(mixer), "ffn": yaml.safe_load(ffn)}}
    blocks |= {name: tree.pop(name) for name in list(tree) if len(name) == 1}
    return ModelConfig.model_validate(tree | {"blocks": blocks})
