"""The loader: order, coverage, resuming, ranks, document numbers, and its thread."""

import hashlib
import itertools
import threading

import numpy as np
import pytest
import torch

from fusedlm.data import Loader
from fusedlm.data.order import Permutation, WindowOrder
from fusedlm.data.ring import rings
from fusedlm.data.shards import Shard, TokenShards

EOT = 0


def shard(lengths: list[int], first: int = 1) -> Shard:
    """Documents of the given lengths, end-of-text included, whose other tokens are all different."""
    n = sum(lengths)
    tokens = np.arange(first, first + n, dtype=np.uint32)
    offsets = np.cumsum([0, *lengths])
    tokens[offsets[:-1]] = EOT
    return Shard(tokens, offsets, np.asarray(lengths) - 1)


@pytest.fixture
def shards() -> TokenShards:
    return TokenShards([shard([5, 1, 30, 14, 9]), shard([40, 23], 1000), shard([3], 2000)])


def draw(shards: TokenShards, n: int, **options) -> list:
    options = {"seq_len": 8, "batch_size": 4, "seed": 0} | options
    with Loader(shards, **options) as loader:
        return [next(loader) for _ in range(n)]


def rows(batches, field: str = "tokens") -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in batches])


def test_shapes_dtypes_and_counts(shards):
    batch = draw(shards, 1)[0]
    for field in ("tokens", "targets", "documents"):
        value = getattr(batch, field)
        assert value.shape == (4, 8) and value.dtype == torch.int64 and value.is_contiguous()
    assert batch.n_valid == 32 and type(batch.n_valid) is int and batch.next_sample == 4
    assert draw(shards, 1, document_mask=False)[0].documents is None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64, 1000, 1025])
def test_a_permutation_has_every_index_once(size):
    for key in (bytes(64), bytes(range(64))):
        assert sorted(Permutation(size, key)(np.arange(size))) == list(range(size))


def test_a_permutation_of_a_huge_range_needs_no_table():
    size = 2**62
    images = Permutation(size, bytes(range(64)))(np.arange(1000))
    assert len(set(images.tolist())) == 1000 and images.min() >= 0 and images.max() < size
    assert abs(images.astype(float).mean() / size - 0.5) < 0.05


def test_permutations_look_random():
    size, keys = 100, [np.random.default_rng(i).bytes(64) for i in range(400)]
    images = np.stack([Permutation(size, key)(np.arange(size)) for key in keys])
    assert np.abs(images.mean(axis=0) - (size - 1) / 2).max() < 4.5 * size / np.sqrt(12 * len(keys))
    neighbours = np.abs(np.diff(images, axis=1)) == 1
    assert 0.01 < neighbours.mean() < 0.03


def test_windows_of_all_shards_are_shuffled():
    order = WindowOrder([800, 1600], seq_len=8, seed=5)
    n = order.windows
    assert n == 300
    shard_numbers, starts = order.locate(np.arange(n))
    followed = (np.diff(shard_numbers) == 0) & (np.diff(starts) == 8)
    assert followed.mean() < 0.05, "windows are in the order of the text"
    for quarter in np.split(shard_numbers, 4):
        assert abs((quarter == 0).mean() - 1 / 3) < 0.2, "shards are not drawn in proportion to their length"


def test_each_epoch_covers_every_window_once():
    order = WindowOrder([59, 63], seq_len=8, seed=5)
    assert order.windows == 7 + 7
    for epoch in range(3):
        ring_numbers, starts = order.locate(np.arange(14) + 14 * epoch)
        for i, length in ((0, 59), (1, 63)):
            inside = np.sort(starts[ring_numbers == i])
            assert len(inside) == 7 and inside.max() < length
            covered = np.concatenate([np.arange(start, start + 8) % length for start in inside])
            assert len(set(covered.tolist())) == 56


@pytest.mark.parametrize(
    ("lengths", "joined"),
    [
        ([8, 9, 8], [[0], [1], [2]]),
        ([8, 7, 9, 1], [[0], [2], [1, 3]]),
        ([3, 20, 2, 9], [[1], [3, 0, 2]]),
        ([1] * 20, [list(range(20))]),
    ],
    ids=["long", "short ones together", "a few tokens", "short alone"],
)
def test_shards_that_are_too_short_for_a_window_are_joined(lengths, joined):
    shards = [shard([length], 100 * i) for i, length in enumerate(lengths)]
    found = rings(shards, 8)
    expected = [np.concatenate([shards[i].tokens for i in ring]).tolist() for ring in joined]
    assert [ring.read(0, len(ring)).tolist() for ring in found] == expected


@pytest.mark.parametrize(("lengths", "seq_len"), [([[3, 2]] * 9, 40), ([[50], [2, 5], [30]], 8), ([[3, 1], [90]], 16)])
def test_every_token_of_short_shards_is_trained_on(lengths, seq_len):
    shards = TokenShards([shard(part, 100 * i + 1) for i, part in enumerate(lengths)])
    batches = draw(shards, 80, seq_len=seq_len)
    ids = np.concatenate([part.tokens for part in shards.shards])
    assert set(rows(batches, "targets").flatten().tolist()) == set(ids.tolist())
    tokens, documents = rows(batches), rows(batches, "documents")
    starts = (tokens == EOT).long()
    starts[:, 0] = 0
    assert torch.equal(documents, starts.cumsum(1))


def test_the_order_of_long_shards_is_the_one_that_runs_were_trained_with():
    shards = TokenShards([shard([5, 20, 7, 33]), shard([41, 2, 30], 1000)])
    digest = hashlib.sha256()
    for batch in draw(shards, 40, seq_len=16):
        for field in ("tokens", "targets", "documents"):
            digest.update(getattr(batch, field).numpy().tobytes())
    assert digest.hexdigest() == "a802f6b9ebbcecd70302e3681443dc59e8bb4a576a7ef7a0d811b166de307369"


def test_every_epoch_and_every_seed_has_its_own_phase_and_order():
    orders = [WindowOrder([800], seq_len=8, seed=seed) for seed in (5, 6)]
    found = [order.locate(np.arange(100) + 100 * epoch)[1] for order in orders for epoch in range(4)]
    assert len({int(starts[0] % 8) for starts in found}) > 2
    # Windows counted from the first one drawn: what the phase does not change.
    relative = [(starts - starts[0]) % 800 // 8 for starts in found]
    for a, b in itertools.combinations(relative, 2):
        assert (a == b).mean() < 0.1


def test_targets_follow_their_tokens_around_the_ring(shards):
    batches = draw(shards, 12, seq_len=7)
    tokens, targets = rows(batches), rows(batches, "targets")
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    after = {}
    first, *others = (part.tokens.astype(np.int64) for part in shards.shards)
    for ring in (first, np.concatenate(others)):  # the last shard is too short for a window
        after |= {int(a): int(b) for a, b in zip(ring, np.roll(ring, -1), strict=True) if a != EOT}
    for token, target in zip(tokens.flatten().tolist(), targets.flatten().tolist(), strict=True):
        assert token == EOT or after[token] == target


def test_the_seed_decides_the_order(shards):
    straight = rows(draw(shards, 10))
    assert torch.equal(straight, rows(draw(shards, 10)))
    assert not torch.equal(straight, rows(draw(shards, 10, seed=1)))


def test_the_order_does_not_depend_on_the_batch_size(shards):
    assert torch.equal(rows(draw(shards, 10)), rows(draw(shards, 5, batch_size=8)))
    assert torch.equal(rows(draw(shards, 10)), rows(draw(shards, 40, batch_size=1)))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_samples_in_the_same_order(shards, ranks):
    full = draw(shards, 9)
    parts = [draw(shards, 9, rank=rank, world_size=ranks) for rank in range(ranks)]
    for field in ("tokens", "targets", "documents"):
        shared = [torch.cat([getattr(part[i], field) for part in parts]) for i in range(9)]
        assert all(torch.equal(a, getattr(b, field)) for a, b in zip(shared, full, strict=True))
    assert [batch.next_sample for batch in parts[-1]] == [batch.next_sample for batch in full]
    assert sum(part[0].n_valid for part in parts) == full[0].n_valid


@pytest.mark.parametrize("after", [1, 4, 9])
def test_resuming_at_a_counter_equals_never_having_stopped(shards, after):
    straight = draw(shards, 14)
    resumed = draw(shards, 14 - after, start_sample=straight[after - 1].next_sample)
    for field in ("tokens", "targets", "documents"):
        assert torch.equal(rows(straight[after:], field), rows(resumed, field))
    assert resumed[-1].next_sample == straight[-1].next_sample


def test_a_loader_can_start_at_any_counter(shards):
    assert draw(shards, 1, start_sample=10**15)[0].next_sample == 10**15 + 4


SHAPES = [(4, 2), (8, 1), (2, 4), (3, 8), (2, 8)]  # by step; the last one from there on; windows of 8 tokens


def step_shape(step):
    return SHAPES[min(step, len(SHAPES) - 1)]


def test_the_stream_of_tokens_does_not_depend_on_the_shape_of_steps(shards):
    ramped, plain = draw(shards, 8, step_shape=step_shape), draw(shards, 3)
    assert [tuple(batch.tokens.shape) for batch in ramped] == [step_shape(step) for step in range(8)]
    assert [batch.next_sample for batch in ramped] == [1, 2, 3, 6, 8, 10, 12, 14]
    assert [batch.n_valid for batch in ramped[:5]] == [8, 8, 8, 24, 16]
    for field in ("tokens", "targets"):
        streams = [torch.cat([getattr(batch, field).flatten() for batch in one]) for one in (ramped, plain)]
        assert torch.equal(streams[0][:96], streams[1][:96]), field


def test_ranks_and_resumed_loaders_agree_on_steps_of_any_shape(shards):
    shape = lambda step: ((4, 4), (8, 2), (4, 8))[min(step, 2)]  # noqa: E731
    alone = draw(shards, 4, step_shape=shape)
    parts = [draw(shards, 4, step_shape=shape, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(alone):
        for field in ("tokens", "targets", "documents"):
            shared = torch.cat([getattr(part[step], field) for part in parts])
            assert torch.equal(shared, getattr(batch, field)), (step, field)
    after = draw(shards, 2, step_shape=shape, start_step=2, start_sample=alone[1].next_sample)
    assert torch.equal(rows(after), rows(alone[2:])) and after[-1].next_sample == alone[-1].next_sample


def test_a_step_that_is_not_whole_windows_is_refused(shards):
    for shape in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match=f"step 0: {shape[0]} rows of {shape[1]} tokens are not whole windows"):
            draw(shards, 1, step_shape=lambda _, shape=shape: shape)


@pytest.mark.parametrize("lengths", [[5, 1, 1, 30, 14, 9], [17], [1] * 20, [16, 1]])
@pytest.mark.parametrize("seq_len", [1, 4, 16])
def test_document_numbers_rise_at_end_of_text(lengths, seq_len):
    batches = draw(TokenShards([shard(lengths)]), 30, seq_len=seq_len)
    tokens, documents = rows(batches), rows(batches, "documents")
    # A document starts at every end-of-text and nowhere else; the ring starts with one.
    starts = (tokens == EOT).long()
    starts[:, 0] = 0
    assert torch.equal(documents, starts.cumsum(1))


def test_a_window_as_long_as_its_shard_wraps_around():
    batch = draw(TokenShards([shard([8])]), 1, batch_size=16)[0]
    for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
        assert sorted(tokens.tolist()) == [0, 2, 3, 4, 5, 6, 7, 8] and targets[-1] == tokens[0]
        assert documents.max() == (0 if tokens[0] == EOT else 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 126}, "seq_len=126 is longer than the text: 125 tokens; lower seq_len or add text"),
        ({"batch_size": 4, "world_size": 3}, "batch_size=4 is not a multiple of the 3 ranks"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not in 0..1"),
        ({"seq_len": 0}, "seq_len=0 must be at least 1"),
        ({"start_sample": -1}, "start_sample=-1 must be at least 0"),
        ({"prefetch": 0}, "prefetch=0 must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(shards, options, message):
    with pytest.raises(ValueError) as caught:
        draw(shards, 1, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_split_without_text_is_refused():
    with pytest.raises(ValueError, match="0 tokens"):
        draw(TokenShards([]), 1)


def test_errors_of_the_thread_are_raised_after_the_batches_before_them(shards, monkeypatch):
    read = Loader._read

    def fail(self, sample, *shape):
        if sample == 8:
            raise OSError(5, "Input/output error")
        return read(self, sample, *shape)

    monkeypatch.setattr(Loader, "_read", fail)
    with Loader(shards, seq_len=8, batch_size=4, seed=0) as loader:
        assert [next(loader).next_sample for _ in range(2)] == [4, 8]
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                next(loader)


@pytest.mark.parametrize("drawn", [0, 3])
def test_closing_ends_the_thread(shards, drawn):
    before = threading.active_count()
    loader = Loader(shards, seq_len=8, batch_size=4, seed=0, prefetch=2)
    for _ in range(drawn):
        next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_the_thread_reads_ahead_by_prefetch_at_most(shards, monkeypatch):
    samples, read = [], Loader._read
    monkeypatch.setattr(
        Loader, "_read", lambda self, sample, *shape: samples.append(sample) or read(self, sample, *shape)
    )
    with Loader(shards, seq_len=8, batch_size=4, seed=0, prefetch=2) as loader:
        for _ in range(5):
            next(loader)
    assert max(samples) <= 4 * (5 + 2)


def test_waiting_is_measured_in_the_consumer(shards):
    with Loader(shards, seq_len=8, batch_size=4, seed=0) as loader:
        assert loader.wait_seconds == 0
        next(loader)
        assert loader.wait_seconds > 0


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_on_the_cpu():
    shards = TokenShards([shard([997, 5, 20_000, 12_345])])
    options = {"seq_len": 1024, "batch_size": 16}
    expected = draw(shards, 40, **options)
    busy = torch.randn(2048, 2048, device="cuda")
    with Loader(shards, seed=0, device="cuda", prefetch=2, **options) as loader:
        for host in expected:
            batch = next(loader)
            busy = torch.tanh(busy @ busy)  # the consumer's stream falls behind the copies
            for field in ("tokens", "targets", "documents"):
                value = getattr(batch, field)
                assert value.is_cuda and torch.equal((value + 0).cpu(), getattr(host, field))
            assert batch.n_valid == host.n_valid and batch.next_sample == host.next_sample
