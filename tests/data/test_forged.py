"""Prepared folders whose checksums are right and whose content is not: refused in one line, and nothing outside the
folder is read or named."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusedlm.config.data import DataConfig, HashSplit, TextSource
from fusedlm.data import Loader, manifest, open_prepared, prepare


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n--\n".join(f"Document {i} of words" for i in range(40)))
    source = TextSource(path=str(folder / "text.txt"), separator="--")
    config = DataConfig(source=source, split=HashSplit(fraction=0.3), dir=str(folder / "prepared"), shard_tokens=300)
    return prepare(config).directory


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / original.name)


def seal(folder: Path, content: dict) -> None:
    """Write a manifest whose checksum fits."""
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": manifest._checksum(content)}))


def forge(folder: Path, name: str, raw: bytes) -> None:
    """Replace a file, and its size and checksum in the manifest."""
    (folder / name).write_bytes(raw)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    seal(folder, content)


def error(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_prepared(folder)
    assert type(caught.value) is manifest.DamagedData and "\n" not in str(caught.value)
    return str(caught.value)


def change(path: str, value):
    """A change of one value of a manifest; `...` removes its key."""

    def apply(content: dict) -> None:
        *parents, last = [int(part) if part.isdecimal() else part for part in path.split("/")]
        for part in parents:
            content = content[part]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return apply


CHANGES = {
    **{f"{key} missing": (change(key, ...), key) for key in ("fingerprint", "tokenizer", "dtype", "splits", "files")},
    "no vocabulary": (change("tokenizer/vocab_size", ...), "tokenizer.vocab_size"),
    "no name": (change("splits/train/shards/0/name", ...), "splits.train.shards.0.name"),
    "dtype": (change("dtype", "<f8"), "dtype"),
    "dtype of objects": (change("dtype", "O"), "dtype"),
    "dtype is a list": (change("dtype", [["a", "<u2"]]), "dtype"),
    "wider dtype": (change("dtype", "<u4"), "does not have the size of"),
    "negative count": (change("splits/train/shards/0/tokens", -1), "tokens"),
    "huge count": (change("splits/train/shards/0/documents", 10**30), "documents"),
    "fraction of a token": (change("splits/train/shards/0/tokens", 1.5), "tokens"),
    "a true count": (change("splits/train/shards/0/documents", True), "documents"),
    "another sum": (change("splits/train/tokens", 7), "splits.train.tokens is not the sum"),
    "shards is a number": (change("splits/train/shards", 3), "splits.train.shards"),
    "shard twice": (lambda m: m["splits"]["train"]["shards"].append(m["splits"]["train"]["shards"][0]), "is named"),
    "shard of the other split": (change("splits/train/shards/0/name", "validation-00000"), "is named"),
    "shard outside": (change("splits/train/shards/0/name", "../../etc/passwd"), "splits.train.shards.0.name"),
    "shard not checked": (change("files/train-00000.bin", ...), "train-00000.bin is not among its files"),
    "larger vocabulary": (change("tokenizer/vocab_size", 300), "not the tokenizer"),
    "smaller vocabulary": (change("tokenizer/vocab_size", 200), "eot_id is not in its vocabulary"),
    "vocabulary too large for dtype": (change("tokenizer/vocab_size", 2**17), "cannot hold"),
    "fingerprint of the tokenizer": (change("tokenizer/fingerprint", "0" * 64), "not the tokenizer"),
    "fingerprint is no digest": (change("fingerprint", "\x1b[31m" * 3), "fingerprint"),
    **{
        f"file named {name!r}": (change("files", {name: {"bytes": 1, "sha256": "0" * 64}}), "'files.")
        for name in ("../escape", ".hidden", "a\0b", "\x1b[2J", "\udc80", "a/../b", "")
    },
    "an absolute file": (lambda m: m["files"].update({"passwd": {"bytes": -3, "sha256": "0" * 64}}), "files.passwd"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_values_of_a_manifest_are_checked(folder, name):
    apply, named = CHANGES[name]
    content = json.loads((folder / "manifest.json").read_text())
    del content["checksum"]
    apply(content)
    seal(folder, content)
    message = error(folder)
    assert named in message and message.startswith(f"{folder}/")
    assert message.endswith(f"move the folder {folder} to another place and prepare again")


def test_a_name_cannot_lead_to_another_folder(folder):
    """Nor is the size of a file there told, or the folder to be moved."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("12345")
    for name in ("../outside/secret", str(outside / "secret")):
        content = json.loads((folder / "manifest.json").read_text())
        content["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        del content["checksum"]
        seal(folder, content)
        message = error(folder)
        assert "5 bytes" not in message and f"the folder {outside}" not in message


def test_no_folder_of_the_user_is_to_be_moved(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for content in (None, "{}", "not JSON"):
        if content is not None:
            (mine / "manifest.json").write_text(content)
        message = error(mine)
        assert message.endswith("name a folder that `fusedlm data prepare` wrote") and "move" not in message


def npy(values, dtype="<i8") -> bytes:
    values = np.asarray(values, dtype)
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {values.shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values.tobytes()


def offsets(folder: Path) -> np.ndarray:
    return np.load(folder / "train-00000.offsets.npy")


def bent(folder: Path, at: int, value: int) -> bytes:
    changed = offsets(folder)
    changed[at] = value
    return npy(changed)


OFFSETS = {
    "start": lambda f: bent(f, 0, 1),
    "end": lambda f: bent(f, -1, 10),
    "decreasing": lambda f: bent(f, 2, 1),
    "document without end-of-text": lambda f: bent(f, 2, int(offsets(f)[1])),
    "in a document": lambda f: bent(f, 2, int(offsets(f)[2]) + 1),
    "negative": lambda f: bent(f, 1, -(2**63)),
    "fewer": lambda f: npy(offsets(f)[1:]),
    "floats": lambda f: npy(offsets(f), "<f8"),
    "big-endian": lambda f: npy(offsets(f), ">i8"),
    "matrix": lambda f: npy(offsets(f)[:, None]),
    "cut": lambda f: npy(offsets(f))[:-8],
    "longer than its file": lambda f: npy(offsets(f)).replace(b"(", b"(10000000"),
    "empty": lambda f: b"",
    "header only": lambda f: npy(offsets(f))[:10],
    "pickle": lambda f: b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.",
    "object array": lambda f: npy(offsets(f)).replace(b"<i8", b"|O "),
    "deep header": lambda f: b"\x93NUMPY\x01\x00\x60\xea" + b"(" * 60000,
    "zip": lambda f: b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_arrays_are_checked(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    forge(folder, "train-00000.offsets.npy", OFFSETS[name](folder))
    assert error(folder).startswith(f"{folder}/train-00000.")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["decreasing", "document without end-of-text", "negative"])
def test_documents_are_in_order_even_if_tokens_are_not_verified(folder, name):
    forge(folder, "train-00000.offsets.npy", OFFSETS[name](folder))
    with pytest.raises(ValueError, match="train-00000.offsets.npy does not divide"):
        open_prepared(folder, verify=False)


def test_bytes_of_documents_are_checked(folder):
    n_bytes = np.load(folder / "train-00000.bytes.npy")
    for changed in (n_bytes + 1, np.concatenate([[-1, n_bytes[0] + n_bytes[1] + 1], n_bytes[2:]])):
        forge(folder, "train-00000.bytes.npy", npy(changed))
        assert "train-00000.bytes.npy does not add up to" in error(folder)


def test_tokens_outside_the_vocabulary_are_found_before_they_reach_a_model(folder):
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    tokens[7] = 257
    forge(folder, "train-00000.bin", tokens.tobytes())
    assert "train-00000.bin has token id 257 at 7, outside the vocabulary of 257" in error(folder)
    data = open_prepared(folder, verify=False)
    loader = Loader(data.train, seq_len=100, batch_size=8, seed=0)
    with loader, pytest.raises(ValueError, match="token id 257 at 7"):
        next(loader)
    with pytest.raises(ValueError, match="token id 257 at 7"):
        list(data.train.documents())


def test_end_of_text_within_a_document_is_found(folder):
    tokens = np.fromfile(folder / "train-00000.bin", "<u2")
    tokens[7] = 256
    forge(folder, "train-00000.bin", tokens.tobytes())
    assert "end-of-text ids where its documents start" in error(folder)


@pytest.mark.parametrize("seed", range(2))
def test_mutated_folders_are_refused_or_equal(original, folder, seed):
    """Random bytes in any file, with the manifest's checksums made to fit, and random values in the manifest."""
    rng = random.Random(seed)
    names = sorted(path.name for path in original.glob("*.[bn]*"))
    values = [None, -1, 0, 1, 2**31, 2**63, 2**64, 1e300, "", "x", "../x", [], {}, [[]], True, "<u4", ["<u2"]]
    for _ in range(25):
        for path in original.iterdir():
            shutil.copy(path, folder)
        if rng.random() < 0.5:
            name = rng.choice(names)
            raw = bytearray((original / name).read_bytes())
            for _ in range(rng.randint(1, 3)):
                raw[rng.randrange(min(len(raw), rng.choice((12, 130, 10**6))))] = rng.randrange(256)
            forge(folder, name, bytes(raw[: rng.choice((len(raw), len(raw), rng.randrange(len(raw)))) or None]))
        else:
            content = json.loads((original / "manifest.json").read_text())
            del content["checksum"]
            node = content
            while True:
                key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
                if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                    node = node[key]
                    continue
                node[key] = rng.choice(values)
                break
            seal(folder, content)
        try:
            data = open_prepared(folder)
        except ValueError as refused:
            assert "\n" not in str(refused)
            continue
        for split in (data.train, data.validation):
            assert sum(len(tokens) for tokens, _ in split.documents()) == split.n_tokens
            assert all(tokens.max() < 257 and n_bytes >= 0 for tokens, n_bytes in split.documents())
