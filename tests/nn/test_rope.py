import math

import pytest
import torch

from fusedlm.nn.rope import apply_rope, inverse_frequencies, rope_table
from fusedlm.testing import assert_close


def _rotate(x_D, position, dim, base=10_000.0):
    table = rope_table(torch.tensor([[position]]), dim, base, torch.float64)
    return apply_rope(x_D[None, None, None], table).flatten()


@pytest.mark.parametrize("dim", [2, 6, 16])
def test_scores_depend_on_distance_alone(dim):
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for distance in (0, 1, 17, 300):
        starts = (distance, distance + 5, distance + 100_000)
        scores = [_rotate(q, m, dim) @ _rotate(k, m - distance, dim) for m in starts]
        for score in scores[1:]:
            assert math.isclose(score, scores[0], rel_tol=1e-9)
    assert not math.isclose(_rotate(q, 3, dim) @ k, _rotate(q, 4, dim) @ k, rel_tol=1e-6)


def test_every_frequency_is_used_once():
    """Rotating a unit vector of each pair by one token turns it by that pair's own angle."""
    dim, base = 8, 1000.0
    angles = []
    for i in range(dim // 2):
        x = torch.zeros(dim, dtype=torch.float64)
        x[i] = 1
        y = _rotate(x, 1, dim, base)
        angles.append(math.atan2(y[i + dim // 2], y[i]))
    assert angles == pytest.approx([base ** (-2 * i / dim) for i in range(dim // 2)], rel=1e-12)
    assert inverse_frequencies(dim, base).tolist() == pytest.approx(angles)


def test_lengths_are_kept_and_the_rest_passes():
    x = torch.randn(2, 5, 3, 10, dtype=torch.float64)
    y = apply_rope(x, rope_table(torch.arange(5)[None], 6, 10_000.0, torch.float64))
    assert_close(y.norm(dim=-1), x.norm(dim=-1), 1e-12)
    assert torch.equal(y[..., 6:], x[..., 6:]) and torch.equal(y[:, 0], x[:, 0])
    assert not torch.allclose(y[:, 1:, :, :6], x[:, 1:, :, :6])


def test_no_rotary_dimensions():
    x = torch.randn(1, 4, 2, 6)
    assert torch.equal(apply_rope(x, rope_table(torch.arange(4)[None], 0, 10_000.0, torch.float32)), x)
