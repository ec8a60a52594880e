"""Which rows of which matrices the processes hold, and who orthogonalises them."""

from types import SimpleNamespace

import pytest
import torch

from fusedlm.nn.module import Role
from fusedlm.optim import shards
from fusedlm.optim.shards import held_parts, owners, piece_of, whole_parts
from fusedlm.optim.stacks import Part, parts_of


@pytest.mark.parametrize("n_shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    ("shape", "dim", "splits"),
    [((10, 3), 0, ()), ((10, 3), 0, (("q", 4), ("k", 1), ("v", 5))), ((3, 4, 2), 0, (("gate", 2), ("up", 2))),
     ((2, 84, 2), 1, (("gate", 50), ("up", 34)))],
)  # fmt: skip
def test_pieces_are_the_rows_of_torchs_chunks(monkeypatch, n_shards, shape, dim, splits):
    """Put together from the parts that torch.chunk gives the processes, every matrix is whole."""
    monkeypatch.setattr(shards, "shard_group", lambda _: (None, dim))
    monkeypatch.setattr(shards, "held_range", lambda parameter: range(len(parameter)))
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    parameter = torch.nn.Parameter(full)
    chunks = list(full.chunk(n_shards, dim))
    chunks += [chunks[0].narrow(dim, 0, 0)] * (n_shards - len(chunks))
    if dim == 1 and shape[1] % n_shards:
        pytest.skip("FSDP shards the second dimension evenly")
    for part in parts_of(parameter, splits):
        pieces = [piece_of(part, shard, n_shards) for shard in range(n_shards)]
        held = [(piece, chunk.contiguous()) for piece, chunk in zip(pieces, chunks, strict=True) if piece.rows]
        assert [piece.first for piece, _ in held] == sorted(piece.first for piece, _ in held)
        assert torch.equal(torch.cat([piece.of(chunk) for piece, chunk in held]), part.of(full))
        assert sum(piece.rows for piece in pieces) == part.rows


@pytest.mark.parametrize("first", [0, 2, 4])
def test_of_divided_experts_a_process_deals_with_the_matrices_of_its_own(monkeypatch, first):
    """Two of six experts, the rows of each in two shards."""
    monkeypatch.setattr(shards, "shard_group", lambda _: (None, 1))
    monkeypatch.setattr(shards, "held_range", lambda _: range(first, first + 2))
    full = torch.arange(6 * 8 * 3.0).view(6, 8, 3)
    parts = held_parts(torch.nn.Parameter(full), Role("matrix", 3, 8, (("gate", 5), ("up", 3))))
    assert [part.start for part in parts] == [8 * first, 8 * first + 5, 8 * first + 8, 8 * first + 13]
    for part in parts:
        rows = []
        for shard in range(2):
            piece = piece_of(part, shard, 2)
            rows.append(piece.of(full[first : first + 2, 4 * shard : 4 * shard + 4].contiguous()))
        assert torch.equal(torch.cat(rows), part.of(full))


@pytest.mark.parametrize("n_shards", [1, 2, 3, 4, 7])
def test_whole_matrices_are_those_of_the_processes_own_experts(monkeypatch, n_shards):
    """Five experts that are sharded by the first dimension; some processes have none."""
    full = torch.arange(5 * 8 * 3.0).view(5, 8, 3)
    role = Role("matrix", 3, 8, (("gate", 5), ("up", 3)))
    parameter = torch.nn.Parameter(full)
    chunks = list(full.chunk(n_shards)) + [full[:0]] * n_shards
    found = []
    for shard in range(n_shards):
        _place(monkeypatch, dim=0, shard=shard, n_shards=n_shards)
        found += [part.of(chunks[shard]) for part in whole_parts(parameter, role)]
    expected = [part.of(full) for part in parts_of(parameter, role.splits)]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_matrices_that_are_cut_or_copied_are_exchanged(monkeypatch):
    stack, matrix = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 6, 2), (6, 2)))
    role = Role("matrix", 2, 6, ())
    _place(monkeypatch, dim=1, n_shards=2)
    assert whole_parts(stack, role) is None
    _place(monkeypatch, dim=0, n_shards=2)
    assert whole_parts(matrix, role) is None
    # In three pieces q is cut, though k and v are whole in one process each.
    _place(monkeypatch, dim=0, n_shards=3)
    assert whole_parts(matrix, Role("matrix", 2, 6, (("q", 4), ("k", 1), ("v", 1)))) is None
    _place(monkeypatch, dim=0, n_copies=2)
    assert whole_parts(stack, role) is None


def _place(monkeypatch, *, dim: int, shard: int = 0, n_shards: int = 1, n_copies: int = 1) -> None:
    monkeypatch.setattr(shards.Place, "of", lambda _: shards.Place(0, n_copies, shard, n_shards, None, None))
    monkeypatch.setattr(shards, "shard_group", lambda _: (None, dim))
    monkeypatch.setattr(shards, "held_range", lambda parameter: range(len(parameter)))


def test_owners_have_about_the_same_work():
    def part(rows: int, columns: int) -> Part:
        return Part(SimpleNamespace(shape=(rows, columns)), 0, rows)

    found = owners([part(8, 8)] * 6 + [part(64, 64)] * 2, 4)
    assert len(set(found[6:])) == 2, "the large ones on processes of their own"
    assert set(found[:6]) == set(range(4)) - set(found[6:])
    assert sorted(found[:6]).count(found[0]) == 3
    assert owners([], 3) == []
