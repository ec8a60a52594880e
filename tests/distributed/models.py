"""Small models that one and several processes train, whole and sharded."""

import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh

from fusedlm import build_model
from fusedlm.config.model import ModelConfig
from fusedlm.model.sharding import shard_model
from fusedlm.nn.module import init_weights

CPU = torch.device("cpu")
VOCAB = 61

_SOFTMAX_AND_DELTA = """
dim: 24
n_layers: 2
pattern: ag
blocks:
  a: {mixer: {type: attention, n_heads: 4, n_kv_heads: 2, window: 9}, ffn: {type: swiglu, hidden: 40}}
  g:
    mixer: {type: gdn, n_heads: 2, chunk_size: 8}
    ffn: {type: moe, n_experts: 3, top_k: 2, hidden: 12, bias_rate: 0.1, sequence_loss: 0.1, z_loss: 0.1}
mtp: {depth: 1, weight: 0.3, block: g}
"""
_LATENT = """
dim: 24
n_layers: 2
pattern: ms
blocks:
  m: {mixer: {type: mla, n_heads: 2, kv_rank: 8, rope_dim: 4}, ffn: {type: relu2, hidden: 20}}
  s: {mixer: {type: sdla, n_heads: 2, rope_dim: 4, chunk_size: 8}, ffn: {type: swiglu, hidden: 20}}
tie_embeddings: false
"""
# Mixtures whose experts are divided.
_EXPERTS = """
dim: 16
n_layers: 1
pattern: a
blocks:
  a:
    mixer: {type: attention, n_heads: 2, window: 9}
    ffn: {type: moe, n_experts: 8, top_k: 3, hidden: 12, n_groups: 4, n_limited_groups: 2, bias_rate: 0.1,
          sequence_loss: 0.1, z_loss: 0.1}
"""
_SKEWED = """
dim: 16
n_layers: 1
pattern: a
blocks:
  a:
    mixer: {type: attention, n_heads: 2}
    ffn: {type: moe, n_experts: 4, top_k: 1, hidden: 20, activation: relu2, slope: 0.3, n_shared: 0, bias_rate: 0}
"""
# Blocks that differ in numbers alone.
_HEADS = """
dim: 24
n_layers: 2
pattern: ab
blocks:
  a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu, hidden: 20}}
  b: {mixer: {type: attention, n_heads: 4}, ffn: {type: swiglu, hidden: 20}}
"""
# Widths of products in 8 bits.
_ALIGNED = """
dim: 32
n_layers: 2
pattern: am
blocks:
  a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu, hidden: 48}}
  m: {mixer: {type: mla, n_heads: 2, kv_rank: 16, rope_dim: 4}, ffn: {type: relu2, hidden: 64}}
mtp: {depth: 1, weight: 0.3, block: a}
"""
FIRST, SECOND = "attention, gdn, moe, mtp", "mla, sdla, untied"
EXPERTS, PREDICTED, SKEWED = "experts", "experts, mtp", "experts, all tokens on the last one"
HEADS, ALIGNED = "attention, other heads", "multiples of 16"
MODELS = {
    FIRST: _SOFTMAX_AND_DELTA,
    SECOND: _LATENT,
    HEADS: _HEADS,
    ALIGNED: _ALIGNED,
    EXPERTS: _EXPERTS,
    PREDICTED: _EXPERTS + "mtp: {depth: 1, weight: 0.3}",
    SKEWED: _SKEWED,
}


def built(
    name: str, layout: tuple[int, ...] | None, dtype: torch.dtype, zero: int = 3, prepare=lambda model: None
) -> torch.nn.Module:
    """A model of MODELS, whole without a layout. prepare: is called with it before it is sharded."""
    config = ModelConfig.model_validate(yaml.safe_load(MODELS[name]))
    model = build_model(config, vocab_size=VOCAB, device="meta").to(dtype)
    prepare(model)
    if layout is not None:
        names = ("replicate", "shard", "experts")[: len(layout)]
        shard_model(model, init_device_mesh("cpu", layout, mesh_dim_names=names), torch.float32, zero)
    model.to_empty(device=CPU)
    init_weights(model, seed=0)
    if name == SKEWED:
        model.blocks[0].ffn.router.bias[-1] = 10.0
    return model
