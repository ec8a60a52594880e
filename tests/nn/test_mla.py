import torch

from fusedlm.nn.context import Context
from fusedlm.testing import assert_close, part_model, randomise_


def test_absorbed_decoding_equals_expanded():
    """Every token decoded alone against the latents, compared with the expanded heads over the whole sequence."""
    case = "{type: mla, n_heads: 4, kv_rank: 12, q_rank: 16, rope_dim: 6, n_kv_groups: 2}"
    mixer = randomise_(part_model(case)).double().blocks[0].mixer
    x = torch.randn(2, 19, 32, dtype=torch.float64)

    def context(first, last, n_past):
        made = Context(torch.arange(first, last)[None], n_past=n_past)
        made.add_rope(mixer.rope_specs(), torch.float64)
        return made

    expanded = mixer(x, context(0, 19, 0))
    state = mixer.init_state(2)
    decoded = [mixer(x[:, t : t + 1], context(t, t + 1, t), state) for t in range(19)]
    assert_close(torch.cat(decoded, dim=1), expanded, 1e-12)


def test_the_state_is_the_latent_and_one_rotated_key():
    model = part_model("{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6}")
    state = model.init_state(1)
    model(torch.arange(10)[None], state=state)
    rows = state.layers[0].rows
    assert rows.shape == (1, 10, 12 + 6)
    again = model.init_state(1)
    model(torch.tensor([[0]]), state=again)
    assert torch.allclose(again.layers[0].rows[:, 0], rows[:, 0], atol=1e-6)
    shifted = part_model("{type: mla, n_heads: 4, kv_rank: 12, rope_dim: 6}")
    shifted.load_state_dict(model.state_dict())
    other = shifted.init_state(1)
    shifted(torch.zeros(1, 10, dtype=torch.int64), state=other)
    same_token = other.layers[0].rows[0]
    assert torch.allclose(same_token[0, :12], same_token[9, :12], atol=1e-6), "the latent has no position"
    assert not torch.allclose(same_token[0, 12:], same_token[9, 12:]), "the key is stored rotated"
