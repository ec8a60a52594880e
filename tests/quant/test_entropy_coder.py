"""The entropy coder of integer matrices: exact, near the entropy, and the same bytes everywhere."""

import hashlib
import lzma

import numpy as np
import pytest
import zstandard

from fusedlm.quant.artifact.code_model import LEVELS, CodeModel, Layout
from fusedlm.quant.artifact.codes import CodesReader, CodesWriter
from fusedlm.quant.artifact.rans import PRECISION, Decoder, Encoder
from fusedlm.quant.artifact.tables import Tables
from tests.quant.artifacts import normal_codes


def encode(matrices: list[tuple[np.ndarray, int]], options: dict | None = None):
    """(states, words, lanes, layouts, estimated bytes) of matrices and their bits."""
    writer = CodesWriter(sum(codes.size for codes, _ in matrices))
    layouts, estimated = [], 0.0
    for codes, bits in matrices:
        n_bytes, best = writer.estimate(codes, bits)
        estimated += n_bytes
        layouts.append(writer.add(codes, bits, best if options is None else options))
    return *writer.finish(), writer.lanes, layouts, estimated


def decode(matrices, states, words, lanes, layouts) -> list[np.ndarray]:
    reader = CodesReader(states, lanes)
    found = [
        reader.read(segment, bits, codes.shape, layout)
        for (codes, bits), segment, layout in zip(matrices, words, layouts, strict=True)
    ]
    reader.finish()
    return found


def size(matrices, options: dict | None = None) -> int:
    states, words, *_ = encode(matrices, options)
    return len(states) + sum(map(len, words))


def entropy_bytes(codes: np.ndarray) -> float:
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (17, 33), (3, 4100)])
def test_matrices_come_back(bits, shape):
    largest = 2 ** (bits - 1) - 1
    draw = np.random.default_rng(bits)
    matrices = [
        normal_codes(shape, bits, largest / 4),
        np.zeros(shape, np.int8),
        np.full(shape, largest, np.int8),
        draw.integers(0, 2, shape).astype(np.int8) * 2 * largest - largest,  # one extreme or the other
        draw.integers(-largest, largest + 1, shape).astype(np.int8),
    ]
    matrices = [(codes.astype(np.int8), bits) for codes in matrices]
    for options in (None, {"transposed": True, "rank": 3}):
        states, words, lanes, layouts, _ = encode(matrices, options)
        for (codes, _), found in zip(matrices, decode(matrices, states, words, lanes, layouts), strict=True):
            assert found.dtype == np.int8 and np.array_equal(codes, found)


@pytest.mark.parametrize("lanes", [1, 3, 256])
def test_steps_of_any_length_share_the_lanes(lanes):
    draw = np.random.default_rng(0)
    counts = draw.integers(1, 1000, (5, 40))
    steps = [(draw.integers(0, 5, n), draw.integers(0, 40, n)) for n in (1, 0, 7, 256, 257, 2000)]
    tables, encoder = Tables(counts, 16), Encoder(lanes)
    for contexts, symbols in steps:
        encoder.start_segment()
        encoder.put(*tables.lookup(contexts, symbols))
        tables.learn(contexts, symbols)
    states, segments = encoder.finish()
    tables, decoder = Tables(counts, 16), Decoder(states, lanes)
    for (contexts, symbols), segment in zip(steps, segments, strict=True):
        decoder.start_segment(segment)
        assert np.array_equal(decoder.get(contexts, tables), symbols)
        tables.learn(contexts, symbols)
        decoder.end_segment()
    decoder.finish()


def test_tables_are_distributions_whatever_they_learn():
    tables = Tables(np.array([[1, 1, 1], [1, 1 << 24, 1]]), 1 << 20)
    for _ in range(40):
        tables.learn(np.array([0, 0, 1]), np.array([2, 2, 0]))
        symbols = np.tile(np.arange(3), 2)
        frequencies, starts = tables.lookup(np.repeat([0, 1], 3), symbols)
        frequencies, starts = frequencies.reshape(2, 3), starts.reshape(2, 3)
        assert (frequencies >= 1).all() and (frequencies.sum(1) == 1 << PRECISION).all()
        assert (starts[:, 0] == 0).all() and (starts[:, 1:] == np.cumsum(frequencies, 1)[:, :-1]).all()


@pytest.mark.parametrize(("bits", "deviation"), [(6, 2.41), (8, 6.35), (4, 1.0), (8, 40.0), (2, 0.5)])
def test_size_is_within_one_percent_of_the_entropy(bits, deviation):
    matrices = [(normal_codes((384, 512), bits, deviation), bits)]
    states, words, *_, estimated = encode(matrices)
    total = len(states) + sum(map(len, words))
    assert total < 1.01 * entropy_bytes(matrices[0][0])
    # What arithmetic adds to the code length of the model: two bytes a lane and half a word.
    assert estimated < total < 1.002 * estimated + len(states)


def test_random_codes_take_no_more_than_their_bits():
    codes = np.random.default_rng(0).integers(-31, 32, (512, 512)).astype(np.int8)
    assert size([(codes, 6)]) < 1.005 * codes.size * np.log2(63) / 8


def test_unequal_columns_are_used():
    draw = np.random.default_rng(0)
    scales = 2.0 ** draw.uniform(-1.5, 1.5, 384)
    codes = np.clip(np.rint(draw.standard_normal((768, 384)) * 2 * scales), -31, 31).astype(np.int8)
    raw = codes.tobytes()
    best = min(len(lzma.compress(raw, preset=9)), len(zstandard.ZstdCompressor(level=22).compress(raw)))
    assert size([(codes, 6)]) < 0.94 * min(best, entropy_bytes(codes))
    # Rows are as good: the matrix is transposed, or its rows have levels.
    assert size([(np.ascontiguousarray(codes.T), 6)]) < 0.94 * min(best, entropy_bytes(codes))


def test_rows_and_columns_are_used_together():
    draw = np.random.default_rng(0)
    rows, columns = 2.0 ** draw.uniform(-1.5, 1.5, (512, 1)), 2.0 ** draw.uniform(-1.5, 1.5, 384)
    codes = np.clip(np.rint(draw.standard_normal((512, 384)) * 3 * rows * columns), -31, 31).astype(np.int8)
    assert size([(codes, 6)]) < 0.92 * entropy_bytes(codes)  # 0.96 with one of the two alone


def test_structure_of_low_rank_is_used():
    draw = np.random.default_rng(0)
    common = np.outer(draw.standard_normal(1024), draw.standard_normal(256)) * 5
    codes = np.clip(np.rint(common + draw.standard_normal((1024, 256)) * 2), -127, 127).astype(np.int8)
    with_rank, without = size([(codes, 8)]), size([(codes, 8)], {"transposed": False, "rank": 0})
    assert with_rank < 0.85 * without and encode([(codes, 8)])[3][0].rank >= 1
    noise = normal_codes((256, 256), 6, 2.41)
    assert encode([(noise, 6)])[3][0].rank == 0


def test_later_matrices_profit_from_earlier_ones():
    draw = np.random.default_rng(0)
    first, second = draw.choice(np.array([-9, 1, 12], np.int8), (2, 48, 48))  # nothing that is assumed beforehand
    alone = sum(sum(map(len, encode([(codes, 6)])[1])) for codes in (first, second))
    assert sum(map(len, encode([(first, 6), (second, 6)])[1])) < 0.97 * alone


def golden_matrix() -> np.ndarray:
    """Of a linear congruential generator: the same wherever integers are."""
    state, values = 12345, []
    for _ in range(37 * 29):
        state = (1103515245 * state + 12345) % 2**31
        values.append(sum((state >> shift) % 9 - 4 for shift in (8, 13, 18, 23)))
    return np.array(values, np.int8).reshape(37, 29)


def test_the_bytes_of_the_format_do_not_change():
    codes = golden_matrix()
    found = hashlib.sha256()
    for options in ({"transposed": False, "rank": 0}, {"transposed": True, "rank": 0}):
        states, words, lanes, layouts, _ = encode([(codes, 5), (codes, 8)], options)
        assert lanes == 16 and all(0 <= layout.level < LEVELS for layout in layouts)
        for part in (states, *words):
            found.update(part)
    # The weights of the rows are floats when they are chosen; given ones must be used in the same way everywhere.
    channel = _Recorder()
    weights = (np.arange(2 * 37) % 11 - 5).reshape(2, 37)
    CodeModel(8)._run(channel, (37, 29), Layout(False, 2, 20), codes.astype(np.int64), np.full(37, 20), weights)
    found.update(channel.record)
    assert found.hexdigest()[:16] == "d57898522ebd9174"


class _Recorder:
    record = b""

    def code(self, contexts, tables, symbols):
        self.record += b"".join(part.astype("<i8").tobytes() for part in (contexts, *tables.lookup(contexts, symbols)))
        return symbols


def test_damage_is_found():
    matrices = [(normal_codes((64, 64), 6, 3.0), 6), (normal_codes((64, 64), 6, 3.0, seed=1), 6)]
    states, words, lanes, layouts, _ = encode(matrices)
    with pytest.raises(ValueError, match="end too early"):
        decode(matrices, states, [words[0][:-2], words[1]], lanes, layouts)
    with pytest.raises(ValueError, match="are left over"):
        decode(matrices, states, [words[0] + b"\0\0", words[1]], lanes, layouts)
    with pytest.raises(ValueError, match="no 16-bit words"):
        decode(matrices, states, [words[0] + b"\0", words[1]], lanes, layouts)
    with pytest.raises(ValueError, match="out of range"):
        decode(matrices, bytes(len(states)), words, lanes, layouts)
    with pytest.raises(ValueError, match="does not end in the state"):
        CodesReader(states, lanes).finish()  # before everything is decoded
