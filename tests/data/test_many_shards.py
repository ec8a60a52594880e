"""Thousands of shards: no more open files than one, and no sample is reached by walking over those before it."""

import hashlib
import os
import resource

import numpy as np
import pytest

from fusedlm.data import Loader
from fusedlm.data.order import Permutation, WindowOrder
from fusedlm.data.packing import PackedRows
from fusedlm.data.samples import Windows
from fusedlm.data.shards import Shard, TokenShards
from fusedlm.data.token_file import TokenFile

N_SHARDS = 10_000


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> TokenShards:
    """A file per shard."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(1, 33, dtype="<u2")
    tokens[[0, 20]] = 0
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    shards = []
    for i in range(N_SHARDS):
        path = folder / f"train-{i:05d}.bin"
        path.write_bytes(tokens.tobytes())
        shards.append(Shard(TokenFile(path, "<u2", 32, 40, digest), np.array([0, 20, 32]), np.array([19, 11])))
    return TokenShards(shards)


@pytest.mark.parametrize("kind", [Windows, PackedRows])
def test_ten_thousand_shards_need_few_open_files(many, kind):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(opened + 20, hard), hard))
    try:
        samples = kind(many, 16, 0)
        with Loader(many, seq_len=16, batch_size=512, seed=0, samples=samples) as loader:
            batches = [next(loader) for _ in range(8)]
        assert len(os.listdir("/proc/self/fd")) <= opened + 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all((batch.tokens < 33).all() for batch in batches) and len(batches) == 8


@pytest.mark.parametrize("kind", [Windows, PackedRows])
def test_the_billionth_sample_costs_what_the_first_does(many, kind, monkeypatch):
    """Counted: reads of files, and elements that go through the permutation."""
    counted = {"reads": 0, "permuted": 0, "draws": 0}

    def count(cls, name, key, size):
        original = getattr(cls, name)

        def counting(self, *arguments):
            counted[key] += size(*arguments)
            return original(self, *arguments)

        monkeypatch.setattr(cls, name, counting)

    count(TokenFile, "__getitem__", "reads", lambda span: 1)
    count(Permutation, "__call__", "permuted", len)
    count(WindowOrder, "_draw", "draws", lambda epoch: 1)
    found = []
    for first in (0, 10**9):
        samples = kind(many, 16, 0)
        counted.update(reads=0, permuted=0, draws=0)
        places = samples.locate(np.arange(first, first + 8))
        for place in places:
            samples.read(place, 0, 16)
        found.append(dict(counted))
    assert found[0]["permuted"] == found[1]["permuted"] == 8
    assert found[0]["draws"] == found[1]["draws"] <= 1
    assert max(one["reads"] for one in found) <= 8 * 3
