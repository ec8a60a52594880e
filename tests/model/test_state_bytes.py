"""Bytes of the live decoding state at width 512 in bfloat16, as the README states them."""

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.testing import part_config

MIB = 2**20


@pytest.mark.parametrize(
    "mixer, at_8192, at_65536",
    [
        ("{type: attention, n_heads: 8}", 16 * MIB, 128 * MIB),
        ("{type: mla, n_heads: 8, kv_rank: 128, rope_dim: 32}", 2.5 * MIB, 20 * MIB),
        ("{type: diff_mla, n_heads: 8, kv_rank: 128, rope_dim: 32}", 2.5 * MIB, 20 * MIB),
        ("{type: cmd_mla, n_heads: 8, kv_rank: 128, rope_dim: 32}", 2.5 * MIB, 20 * MIB),
    ],
)
def test_softmax_mixers(mixer, at_8192, at_65536):
    assert _live_bytes(mixer, 8192) == at_8192
    assert _live_bytes(mixer, 65536) == at_65536


@pytest.mark.parametrize("mixer", ["gdn", "sdla", "mamba2"])
def test_linear_mixers(mixer):
    case = f"{{type: {mixer}, n_heads: 8}}"
    assert _live_bytes(case, 64) == _live_bytes(case, 8192) < MIB


def _live_bytes(mixer: str, n_tokens: int) -> int:
    """Of one layer and one sequence; the first tokens are fed, the rest stands for as many."""
    config = part_config(mixer).model_copy(update={"dim": 512, "n_layers": 1})
    model = build_model(config, vocab_size=61).to(torch.bfloat16)
    state = model.init_state(1)
    with torch.no_grad():
        model(torch.zeros(1, 32, dtype=torch.int64), state=state)
    state.extend_to(n_tokens)
    return state.nbytes()
