"""Damaged artifacts: each is refused in one line that names the part and the check; none is read as another model."""

import copy
import json
import random
import tracemalloc

import numpy as np
import pytest
import torch

from fusedlm.quant import load
from fusedlm.quant.artifact import DamagedArtifact, read_artifact
from fusedlm.quant.artifact.coders import compress
from tests.fuzz.mutations import damage_json
from tests.quant.artifacts import forge, join, matrix, normal_codes, pack_small, same, split, write

TENSORS = {
    "normal": matrix(normal_codes((40, 48), 6, 3.0), 6),
    "wide": matrix(normal_codes((20, 64), 8, 20.0), 8, 16, torch.float16),
    "repeated": matrix(np.tile(np.arange(-31, 32, dtype=np.int8), (8, 3)), 6),
    "gain": torch.linspace(0, 1, 50),
    "half": torch.linspace(0, 1, 20, dtype=torch.float16),
}


@pytest.fixture(scope="module")
def intact() -> bytes:
    packed = pack_small(TENSORS)
    assert {entry.coder for entry in packed.header.matrices} == {"rans", "lzma"}
    return packed.content


def refused(path, content: bytes) -> str:
    """The message with which a file is refused."""
    with pytest.raises(DamagedArtifact) as error:
        read_artifact(write(path, content))
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def damages(content: bytes):
    """1,000 damaged files, with what was done; 300 more have checksums that agree."""
    draw = random.Random(0)
    for _ in range(400):
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        yield f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    for _ in range(200):
        end = draw.randrange(len(content))
        yield f"cut at {end}", content[:end]
    for _ in range(100):
        yield "more", content + draw.randbytes(draw.randrange(1, 50))
    for _ in range(150):
        first, second = sorted(draw.sample(range(len(content)), 2))
        yield "zeros", content[:first] + bytes(second - first) + content[second:]
    header, sections = split(content)
    for _ in range(150):
        swapped = list(sections)
        first, second = draw.sample(range(len(sections)), 2)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        yield f"sections {first} and {second}", content[: len(content) - sum(map(len, sections))] + b"".join(swapped)


def test_a_thousand_damaged_files_are_refused(intact, tmp_path):
    parts, n = set(), 0
    for how, content in damages(intact):
        if content == intact:  # zeros over zeros
            continue
        n += 1
        message = refused(tmp_path / "a.flm", content)
        part = message.partition(": ")[0]
        assert part in ("file", "header", "tokenizer", "states") or part.startswith(
            ("codes of", "scales of", "tensors of")
        ), how
        parts.add(part)
    assert n >= 999 and parts >= {"file", "header", "tokenizer", "states", "codes of normal", "tensors of float32"}


def test_forged_headers_are_refused_or_have_no_effect(intact, tmp_path):
    """Whoever makes the checksums agree is not told from a writer, but what the tensors are is checked by decoding."""
    draw, path = random.Random(1), tmp_path / "a.flm"
    header, sections = split(intact)
    n_refused = 0
    for _ in range(300):
        changed = json.loads(damage_json(json.dumps(header).encode(), draw))
        try:
            artifact = read_artifact(write(path, join(changed, sections)))
        except DamagedArtifact as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            n_refused += 1
        else:
            assert all(same(TENSORS[name], tensor) for name, tensor in artifact.tensors.items())
            assert artifact.tensors.keys() == TENSORS.keys()
    assert n_refused > 200


def test_forged_sections_are_refused(intact, tmp_path):
    """Bits of a section are changed, and its checksum is made to agree."""
    draw, path = random.Random(2), tmp_path / "a.flm"
    _, sections = split(intact)
    for _ in range(100):
        index = draw.randrange(1, len(sections))
        at, bit = draw.randrange(len(sections[index])), draw.randrange(8)

        def change(header, found, index=index, at=at, bit=bit):
            section = bytearray(found[index])
            section[at] ^= 1 << bit
            found[index] = bytes(section)

        message = refused(path, forge(intact, change))
        assert message.partition(":")[0] != "file"


def entry(of: str, **changes):
    def change(header, sections):
        found = [e for e in header["matrices"] + header["tensors"] if e["name"] == of]
        found[0].update(changes)

    return change


def top(**changes):
    return lambda header, sections: header.update(changes)


def part(index: int, **changes):
    return lambda header, sections: header["parts"][index].update(changes)


CASES = [
    (entry("normal", shape=[1 << 30, 1 << 30]), "scales of bfloat16: "),
    (entry("normal", shape=[40, 1 << 30]), "bytes cannot hold 42949672960"),
    (entry("normal", shape=[1 << 41, 0]), "matrices.0.shape.0="),
    (entry("normal", shape=[-1, 48]), "matrices.0.shape.0=-1"),
    (entry("normal", shape=[40.5, 48]), "matrices.0.shape.0=40.5"),
    (entry("normal", shape=[48, 40]), "scales of bfloat16: "),
    (entry("normal", shape=[40, 49]), "codes of normal: "),
    (entry("normal", bits=7), "codes of normal: "),
    (entry("normal", bits=1), "matrices.0.bits=1"),
    (entry("normal", bits=True), "matrices.0.bits=True"),
    (entry("normal", group=1), "scales of bfloat16: "),
    (entry("normal", group=0), "matrices.0.group=0"),
    (entry("normal", coder="gzip"), "matrices.0.coder='gzip'"),
    (entry("normal", coder="raw"), "codes of normal: holds"),
    (entry("normal", transposed=True), ""),
    (entry("normal", rank=4), "matrices.0.rank=4"),
    (entry("normal", rank=1), ""),
    (entry("normal", level=48), "matrices.0.level=48"),
    (entry("normal", bytes=1), "file: "),
    (entry("normal", bytes=-1), "matrices.0.bytes=-1"),
    (entry("normal", bytes=1 << 39), "file: "),
    (entry("normal", check="0" * 16), "codes of normal: its checksum differs"),
    (entry("normal", name="wide"), "tensor 'wide' is there twice"),
    (entry("normal", name="other"), "tensors: decoded, they have another checksum"),
    (entry("gain", shape=[5, 10]), "tensors: decoded, they have another checksum"),
    (entry("gain", shape=[51]), "tensors of float32: "),
    (entry("gain", shape=[1 << 40, 1 << 40]), "tensors of float32: "),
    (entry("gain", dtype="int32"), "its parts ("),
    (entry("gain", dtype="object"), "tensors.0.dtype='object'"),
    (entry("gain", surprise=1), "tensors.0.surprise=1"),
    (top(lanes=0), "lanes=0"),
    (top(lanes=2), "states: "),
    (top(lanes=1 << 30), "lanes="),
    (top(content="0" * 32), "tensors: decoded, they have another checksum"),
    (top(step=-1), "step=-1"),
    (top(weights="all"), "weights='all'"),
    (top(recipe="name: 1"), "recipe: "),
    (top(recipe="[" * 2000), "recipe: "),
    (part(0, size=1 << 40), "tokenizer: "),
    (part(0, size=5), "tokenizer: holds"),
    (part(0, coder="raw"), "tokenizer: holds"),
    (part(1, size=3), "states: 3 bytes, its tensors have"),
]


@pytest.mark.parametrize(("change", "words"), CASES, ids=range(len(CASES)))
def test_no_field_is_trusted(intact, tmp_path, change, words):
    content = forge(intact, change)
    tracemalloc.start()
    try:
        message = refused(tmp_path / "a.flm", content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in message and peak < 64 << 20


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([1], "not texts by the names"),
        ({"a": 1}, "not texts by the names"),
        ({}, "tokenizer.meta.json is missing"),
        ({"tokenizer.meta.json": "{}"}, "'type'"),
        (
            {"tokenizer.meta.json": '{"type": "subword", "fingerprint": "", "end_of_text": "x"}'},
            "tokenizer.json is missing",
        ),
        ({"tokenizer.meta.json": '{"type": "bytes", "fingerprint": "0"}'}, "changed since it was saved"),
    ],
)
def test_a_forged_tokenizer_is_refused(intact, tmp_path, files, words):
    def change(header, sections):
        raw = json.dumps(files).encode()
        sections[0] = raw
        header["parts"][0].update(coder="raw", size=len(raw))

    message = refused(tmp_path / "a.flm", forge(intact, change))
    assert message.startswith("tokenizer: ") and words in message


def test_tables_that_are_missing_are_named(intact, tmp_path):
    header, sections = split(intact)
    message = refused(tmp_path / "a.flm", join(header | {"parts": []}, sections))
    assert "its parts () are not those of its tensors" in message
    assert "header: matrices=None" in refused(tmp_path / "a.flm", join(header | {"matrices": None}, sections))
    assert "header: JSON=" in refused(tmp_path / "a.flm", join([1], sections))


def test_codes_outside_their_bits_are_refused(intact, tmp_path):
    def change(header, sections):
        index = len(header["parts"]) + 2
        sections[index] = compress(np.full((8, 189), 32, np.int8).tobytes(), ("lzma",))["lzma"]
        header["matrices"][2]["transposed"] = False

    message = refused(tmp_path / "a.flm", forge(intact, change))
    assert message == "codes of repeated: codes from 32 to 32 are not of 6 bits"


def test_files_that_are_no_artifact(intact, tmp_path):
    path = tmp_path / "a.flm"
    for content in (b"", b"\x89PNG\r\n\x1a\n" + bytes(50), b"name: small\n", intact.replace(b"\r\n", b"\n", 1)):
        assert refused(path, content) == "file: its first bytes are not those of an artifact of fusedlm pack"
    assert "it is truncated" in refused(path, intact[:20])
    newer = intact[:8] + b"\x02" + intact[9:]
    assert refused(path, newer) == "file: its format is version 2, this one reads 1; pack the run again"
    with pytest.raises(OSError):
        read_artifact(tmp_path / "nowhere.flm")


def test_a_model_that_its_tensors_do_not_fill_is_not_allocated(intact, tmp_path):
    """The tensors of `intact` are those of no model: the recipe is believed only if they are its own."""
    path = write(tmp_path / "a.flm", intact)
    with pytest.raises(ValueError, match="is in only one of the checkpoint and the model of the recipe"):
        load(path, device="cpu")

    def widen(header, sections):
        recipe = header["recipe"].replace("dim: 16", "dim: 262144")
        header["recipe"] = recipe.replace("n_layers: 1\n", "n_layers: 1000\n")

    path = write(path, forge(copy.copy(intact), widen))
    with pytest.raises(ValueError, match="1000 layers have more tensors than the 5 here"):
        load(path, device="cpu")
