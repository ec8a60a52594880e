"""Artifacts: every tensor comes back bit for bit, the same input gives the same bytes, the best coder is taken."""

import importlib.util
import lzma
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from fusedlm.config import dump_recipe
from fusedlm.data.tokenizer import train_bpe
from fusedlm.quant.artifact import Container, pack, read_artifact
from fusedlm.quant.artifact.budget import OverBudget, break_down
from fusedlm.quant.artifact.coders import REQUIRED, compress, decompress, from_planes, planes, why_not
from fusedlm.quant.artifact.table import DTYPES, SCALE_DTYPES
from fusedlm.quant.integer import IntegerMatrix
from tests.quant.artifacts import RECIPE, matrix, normal_codes, pack_small, same, write

SHAPES = [(), (0,), (1,), (3, 0), (0, 3), (1, 7), (5, 3, 2)]


def plain_tensors() -> dict[str, torch.Tensor]:
    """Every dtype in every shape, of random bytes: NaN with payloads and subnormal numbers among the floats."""
    draw = np.random.default_rng(0)
    found = {}
    for name, dtype in DTYPES.items():
        for shape in SHAPES:
            raw = draw.integers(0, 2 if dtype == torch.bool else 256, int(np.prod(shape)) * dtype.itemsize)
            flat = torch.from_numpy(raw.astype(np.uint8)).view(dtype) if raw.size else torch.empty(0, dtype=dtype)
            found[f"{name}.{'x'.join(map(str, shape))}"] = flat.reshape(shape)
    return found


def matrices() -> dict[str, IntegerMatrix]:
    found = {}
    for bits in range(2, 9):
        largest = 2 ** (bits - 1) - 1
        draw = np.random.default_rng(bits)
        for shape in [(0, 5), (5, 0), (1, 1), (1, 40), (33, 50)]:
            cases = {
                "normal": normal_codes(shape, bits, largest / 5),
                "zero": np.zeros(shape, np.int8),
                "extreme": (draw.integers(0, 2, shape) * 2 * largest - largest).astype(np.int8),
            }
            for number, (name, codes) in enumerate(cases.items()):
                for group in (None, 7):
                    dtype = getattr(torch, SCALE_DTYPES[number])
                    found[f"{bits}.{name}.{shape}.{group}"] = matrix(codes, bits, group, dtype)
    return found


def test_every_tensor_comes_back(tmp_path):
    tensors = plain_tensors() | matrices()
    packed = pack_small(tensors)
    artifact = read_artifact(write(tmp_path / "model.flm", packed.content))
    assert artifact.tensors.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not same(tensor, artifact.tensors[name])] == []
    assert (artifact.step, artifact.weights, artifact.text) == (3, "raw", "none")
    assert dump_recipe(artifact.recipe) == dump_recipe(RECIPE)
    assert {entry.coder for entry in packed.header.matrices} == {"rans", "raw"}  # raw: without elements


def test_the_values_are_those_that_were_packed(tmp_path):
    one = matrix(normal_codes((8, 20), 6, 4.0), 6, 7, torch.float16)
    found = read_artifact(write(tmp_path / "a", pack_small({"w": one}).content)).tensors["w"]
    scales = torch.stack([one.scales[:, column // 7] for column in range(20)], dim=1)
    assert torch.equal(found.values(), one.codes.float() * scales.float())


def test_tokenizers_come_back(tmp_path):
    tokenizer = train_bpe(["the naïve theory of the other thing\n" * 9], 280)
    packed = pack({}, RECIPE, tokenizer, step=0, text="none", weights="ema")
    artifact = read_artifact(write(tmp_path / "a", packed.content))
    assert artifact.tokenizer.files() == tokenizer.files() and artifact.weights == "ema"
    assert artifact.tokenizer.fingerprint == tokenizer.fingerprint


def test_the_same_input_gives_the_same_bytes():
    tensors = {"a": matrix(normal_codes((200, 90), 6, 3.0), 6), "b": torch.arange(9.0)}
    assert pack_small(tensors).content == pack_small(tensors).content
    other = dict(tensors) | {"b": torch.arange(9.0) + 1}
    assert pack_small(tensors).content != pack_small(other).content


def test_coders_take_turns():
    draw = np.random.default_rng(0)
    repeated = np.tile(draw.integers(-127, 128, (1, 300)), (200, 1)).astype(np.int8)
    coders = {
        entry.name: entry.coder
        for entry in pack_small(
            {
                "normal": matrix(normal_codes((200, 300), 6, 2.4), 6),
                "repeated": matrix(repeated, 8),
                "tiny": matrix(np.array([[5]], np.int8), 8),
            }
        ).header.matrices
    }
    assert coders["normal"] == "rans" and coders["repeated"] in ("lzma", "zstd") and coders["tiny"] == "rans"


@pytest.mark.parametrize("coder", [*REQUIRED, "brotli"])
@pytest.mark.parametrize("data", [b"", b"a", b"abc" * 1000, bytes(100_000), np.random.default_rng(0).bytes(5000)])
def test_bytes_come_back(coder, data):
    if why_not(coder):
        pytest.skip(why_not(coder))
    coded = compress(data, (coder,)).get(coder)
    if coded is None:  # raw never does, the others if a reader would not believe how much it holds
        assert coder != "raw" and len(data) > 8192
        return
    assert decompress(coded, coder, len(data)) == data
    for wrong in (len(data) + 1, len(data) - 1):
        if wrong >= 0:
            with pytest.raises(ValueError, match="holds"):
                decompress(coded, coder, wrong)


def test_a_bomb_is_not_unpacked():
    for coder in ("lzma", "zstd"):
        coded = compress(bytes(1 << 20), (coder,)) or {}
        assert all(len(part) * 8192 + 65536 >= 1 << 20 for part in coded.values())
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 6}]
    bombs = {
        "zstd": zstandard.ZstdCompressor(level=3).compress(bytes(1 << 26)),
        "lzma": lzma.compress(bytes(1 << 26), lzma.FORMAT_RAW, filters=filters),
    }
    for coder, bomb in bombs.items():
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="holds more bytes|not what"):
                decompress(bomb, coder, 1000)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_planes_put_equal_bytes_together():
    data = np.arange(6, dtype="<u2").tobytes()
    assert planes(data, 2) == bytes([0, 1, 2, 3, 4, 5]) + bytes(6)
    for width in (1, 2, 4, 8):
        assert from_planes(planes(data[:8], width), width) == data[:8]


def test_a_coder_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert why_not("lzma") is None
    with pytest.raises(ValueError, match="the package brotli is not installed; pip install brotli"):
        decompress(b"", "brotli", 0)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "tensor 'w' of torch.complex64: must be one of float64"),
        (
            {"w": IntegerMatrix(torch.full((2, 2), 8, dtype=torch.int8), torch.ones(2, 1), 4)},
            "codes from 8 to 8 are not",
        ),
        ({"w": IntegerMatrix(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 2), 4)}, "scales have shape (2, 2)"),
        ({"w": IntegerMatrix(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1), 9)}, "bits=9 must be 2 to 8"),
        ({"w": IntegerMatrix(torch.zeros(2, 2), torch.ones(2, 1), 4)}, "codes must be int8 (rows, columns)"),
        (
            {"w": IntegerMatrix(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1).double(), 4)},
            "scales of torch.float",
        ),
        (
            {"w": IntegerMatrix(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1), 4, 0)},
            "group=0 must be at least 1",
        ),
    ],
)
def test_what_cannot_be_packed_is_named(tensors, words):
    with pytest.raises(ValueError) as error:
        pack_small(tensors)
    assert words in str(error.value) and "'w'" in str(error.value)


def test_the_breakdown_is_of_the_whole_file(tmp_path):
    tensors = {"a": matrix(normal_codes((64, 90), 6, 3.0), 6), "b": torch.arange(9.0), "c": torch.zeros(0)}
    packed = pack_small(tensors)
    breakdown = break_down(packed.header, packed.header_bytes)
    assert breakdown.total == len(packed.content) == round(sum(row.bytes for row in breakdown.rows))
    by_name = {row.name: row for row in breakdown.rows}
    assert [row.name for row in breakdown.rows[:3]] == ["a", "b", "c"]
    assert by_name["a"].bits == 6 and by_name["b"].bits == 32 and by_name["c"].bits_per_element is None
    assert by_name["a"].bits_per_element == 8 * by_name["a"].bytes / (64 * 90)
    container = Container(write(tmp_path / "a", packed.content))
    assert break_down(container.header, container.header_bytes) == breakdown
    error = OverBudget(breakdown, breakdown.total - 5)
    assert f"{breakdown.total:,} bytes, 5 more than --bytes {breakdown.total - 5}" in str(error)
