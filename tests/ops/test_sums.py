"""Sums of columns against float64."""

import pytest
import torch

from fusedlm.testing import assert_close, error_ratio

sums = pytest.importorskip("fusedlm.ops.common.sums")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (1, 40), (2, 16), (3, 17), (528, 64), (511, 33), (1056, 6), (1057, 100), (8448, 1), (8193, 3)]


def _parts(n_parts, width):
    g = torch.Generator().manual_seed(n_parts + width)
    return torch.randn(n_parts, width, generator=g).to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_sums(shape, poisoned):
    parts = _parts(*shape)
    found, exact = sums.column_sums(parts, torch.float32), parts.double().sum(0)
    assert found.dtype == torch.float32
    assert_close(found, exact, max(4 * error_ratio(parts.sum(0), exact), 1e-6))
    assert torch.equal(found, sums.column_sums(parts, torch.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_numbers_are_summed_exactly(shape, poisoned):
    parts = (8 * _parts(*shape)).round()
    assert torch.equal(sums.column_sums(parts, torch.float32), parts.sum(0))


@pytest.mark.parametrize("shapes", [((528, 64), (1056, 6)), ((1, 1), (8193, 33)), ((700, 17), (0, 5))], ids=str)
def test_two_at_once_are_each_as_alone(shapes, poisoned):
    first, second = (_parts(*shape) for shape in shapes)
    found = sums.column_sums_of_two(first, torch.float32, second, torch.bfloat16)
    assert torch.equal(found[0], sums.column_sums(first, torch.float32))
    assert torch.equal(found[1], sums.column_sums(second, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_only_the_end_has_the_dtype_asked_for(dtype, poisoned):
    """Whole numbers that cancel to small ones, which every dtype can hold, on a way that only float32 can."""
    large, small = (1000 * _parts(600, 24)).round(), (30 * _parts(1, 24)).round()
    found = sums.column_sums(torch.cat([large, small, -large.flip(0)]), dtype)
    assert torch.equal(found, small[0].to(dtype))


@pytest.mark.parametrize("width", [1, 5, 16, 100])
def test_nothing_sums_to_zero(width, poisoned):
    assert torch.equal(
        sums.column_sums(_parts(0, width), torch.bfloat16), torch.zeros(width).to(DEVICE, torch.bfloat16)
    )


@pytest.mark.parametrize("shape", [(700, 17), (8448, 1), (1056, 6)], ids=str)
def test_opposite_signs(shape, poisoned):
    """A thousandth of the numbers is left, off by at most the roundings that each number goes through."""
    parts = _parts(*shape)
    parts = torch.cat([parts, parts[:1], -parts * (1 + 1e-3 * parts)])
    n_additions = 20  # 3 turns and a tree over at most 2^13 rows
    off = (sums.column_sums(parts, torch.float32) - parts.double().sum(0)).abs()
    assert (off <= n_additions * 2**-24 * parts.double().abs().sum(0)).all()


def test_neighbouring_memory_is_neither_read_nor_written():
    wide = torch.full((700, 37), float("nan"), device=DEVICE)
    wide[1:-1] = _parts(698, 37)
    assert_close(sums.column_sums(wide[1:-1], torch.float32), wide[1:-1].double().sum(0), 1e-6)
