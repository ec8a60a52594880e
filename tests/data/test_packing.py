"""Best-fit packing: the bins are those of the sequential algorithm, and rows lose no token."""

from collections import Counter

import numpy as np
import pytest
import torch

from fusedlm.data import Loader
from fusedlm.data.best_fit import best_fit_decreasing
from fusedlm.data.packing import IGNORED, PackedRows
from fusedlm.data.shards import TokenShards
from tests.data.test_loader import EOT, rows, shard


def bins_one_by_one(counts: np.ndarray) -> list[list[int]]:
    """Best-fit decreasing as it is defined: each item into the fullest bin that it fits into."""
    capacity, bins = len(counts) - 1, []
    for size in np.repeat(np.arange(len(counts)), counts)[::-1].tolist():
        fitting = [own for own in bins if sum(own) + size <= capacity]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@pytest.mark.parametrize("case", range(40))
def test_bins_are_those_of_the_sequential_algorithm(case):
    rng = np.random.default_rng(case)
    capacity = int(rng.integers(1, 40))
    counts = rng.integers(0, 1 + int(rng.integers(1, 30)), capacity + 1) * (rng.random(capacity + 1) < 0.6)
    counts[0] = 0
    groups = best_fit_decreasing(counts)
    found, items = [], Counter()
    for group in groups:
        for j in range(group.bins):
            own = [(s.size, s.first + j * s.n + i) for s in group.shares for i in range(s.n)]
            items.update(own)
            found.append([size for size, _ in own])
    # Which of two equally full bins an item goes into is not defined; how full bins become is.
    assert sorted(map(sum, found)) == sorted(map(sum, bins_one_by_one(counts)))
    expected = {(size, i): 1 for size in range(capacity + 1) for i in range(counts[size])}
    assert items == expected  # every item once


def test_a_billion_documents_are_packed_by_their_lengths():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 10**6, 2049)
    counts[0] = 0
    groups = best_fit_decreasing(counts)
    assert counts.sum() > 10**9 and len(groups) < 3 * len(counts)
    packed = sum(group.bins * sum(share.size * share.n for share in group.shares) for group in groups)
    assert packed == (counts * np.arange(2049)).sum()
    assert sum(group.bins for group in groups) * 2048 < 1.01 * packed


@pytest.fixture
def shards() -> TokenShards:
    """Documents shorter than a row of 8, as long as it, longer, and several times as long."""
    return TokenShards([shard([5, 1, 30, 14, 9, 8]), shard([40, 23, 2, 2, 2, 7, 16], 1000), shard([3], 2000)])


def draw(shards: TokenShards, n: int, seq_len: int = 8, seed: int = 0, **options) -> list:
    samples = PackedRows(shards, seq_len, seed)
    options = {"seq_len": seq_len, "batch_size": 1, "seed": seed, "samples": samples} | options
    with Loader(shards, **options) as loader:
        return [next(loader) for _ in range(n)]


def pairs(shards: TokenShards) -> Counter:
    """Every token with its target: the next of its document, or end-of-text."""
    found = Counter()
    for tokens, _ in shards.documents():
        found.update(zip(tokens.tolist(), [*tokens[1:].tolist(), EOT], strict=True))
    return found


@pytest.mark.parametrize("seq_len", [1, 4, 8, 13, 40, 64, 500])
def test_every_epoch_trains_on_every_token_once(shards, seq_len):
    packed = PackedRows(shards, seq_len, 0)
    for epoch in range(3):
        batches = draw(shards, packed.per_epoch, seq_len, start_sample=epoch * packed.per_epoch)
        tokens, targets = rows(batches).flatten(), rows(batches, "targets").flatten()
        kept = targets != IGNORED
        found = Counter(zip(tokens[kept].tolist(), targets[kept].tolist(), strict=True))
        assert found == pairs(shards)
        # What is not a token is filled up, and is reported.
        assert kept.sum() == shards.n_tokens
        assert packed.padded == pytest.approx(1 - shards.n_tokens / len(kept), abs=1e-12)
        assert sum(batch.n_valid for batch in batches) == shards.n_tokens
    lengths = [len(tokens) for tokens, _ in shards.documents()]
    assert packed.cut == sum(length > seq_len for length in lengths)


def test_documents_that_fit_are_not_cut(shards):
    packed = PackedRows(shards, 16, 0)
    batches = draw(shards, packed.per_epoch, 16)
    documents, tokens, targets = (rows(batches, field) for field in ("documents", "tokens", "targets"))
    parts = []
    for row in range(len(tokens)):
        kept = targets[row] != IGNORED
        # Numbers begin at 0, do not skip, and what fills up a row is a document of its own.
        assert documents[row].unique().tolist() == list(range(int(documents[row].max()) + 1))
        assert set(documents[row][kept].tolist()).isdisjoint(documents[row][~kept].tolist())
        for number in documents[row][kept].unique():
            parts.append(tuple(tokens[row][documents[row] == number].tolist()))
    whole = [tuple(tokens.tolist()) for tokens, _ in shards.documents() if len(tokens) <= 16]
    assert Counter(parts) & Counter(whole) == Counter(whole)
    cut = [tokens.tolist() for tokens, _ in shards.documents() if len(tokens) > 16]
    expected = [tuple(tokens[i : i + 16]) for tokens in cut for i in range(0, len(tokens), 16)]
    assert Counter(parts) - Counter(whole) == Counter(expected)


def test_targets_end_with_end_of_text(shards):
    batch = draw(TokenShards([shard([3, 2])]), 1)[0]
    assert batch.tokens.tolist() == [[0, 2, 3, 0, 5, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 0, 5, 0, -100, -100, -100]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]] and batch.n_valid == 5


def test_rows_have_an_order_and_neighbours_of_their_own_in_every_epoch():
    shards = TokenShards([shard([3] * 200 + [5] * 200)])
    packed = PackedRows(shards, 8, 0)
    assert packed.per_epoch == 200 and packed.padded == 0
    first, second = (rows(draw(shards, 200, start_sample=start)) for start in (0, 200))
    assert not torch.equal(first, second) and not torch.equal(first, rows(draw(shards, 200, seed=1)))
    assert torch.equal(first, rows(draw(shards, 200)))
    together = [{tuple(row.tolist()) for row in epoch} for epoch in (first, second)]
    assert len(together[0] & together[1]) < 20


def test_rows_do_not_depend_on_the_shape_of_steps(shards):
    plain = draw(shards, 24)
    for shape in ((4, 2), (2, 4), (3, 8)):
        parts = draw(shards, 24 * 8 // (shape[0] * shape[1]), step_shape=lambda _, shape=shape: shape)
        for field in ("tokens", "targets"):
            assert torch.equal(rows(parts, field).flatten(), rows(plain, field).flatten())
        for batch in parts:
            assert (batch.documents[:, 0] == 0).all() and (batch.documents.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("after", [1, 7, 30])
def test_resuming_and_ranks_give_the_same_rows(shards, after):
    straight = draw(shards, 40, batch_size=6)
    resumed = draw(shards, 40 - after, batch_size=6, start_sample=straight[after - 1].next_sample)
    parts = [draw(shards, 40, batch_size=6, rank=rank, world_size=3) for rank in range(3)]
    for field in ("tokens", "targets", "documents"):
        assert torch.equal(rows(straight[after:], field), rows(resumed, field))
        shared = [torch.cat([getattr(part[i], field) for part in parts]) for i in range(40)]
        assert torch.equal(torch.cat(shared), rows(straight, field))


def test_text_without_a_token_is_refused():
    with pytest.raises(ValueError, match="0 tokens to pack into rows"):
        PackedRows(TokenShards([]), 8, 0)


def test_the_cost_is_told(shards):
    assert PackedRows(shards, 16, 0).facts() == (
        "11 rows, 7.95% of the positions filled up, no token left out; 3 of 14 documents longer than a row and cut"
    )
