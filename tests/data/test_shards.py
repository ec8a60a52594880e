"""Opening a prepared folder names the file that was changed, and what to do."""

import json
import resource
from pathlib import Path

import pytest

from fusedlm.config.data import BPETokenizerConfig, DataConfig, HashSplit, TextSource
from fusedlm.data import open_prepared, prepare


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = tmp_path / "corpus.txt"
    path.write_text("\n--\n".join(f"Document {i} of words" for i in range(40)))
    return DataConfig(
        source=TextSource(path=str(path), separator="--"),
        split=HashSplit(fraction=0.3),
        tokenizer=BPETokenizerConfig(vocab_size=280),
        dir=str(tmp_path / "prepared"),
    )


@pytest.fixture
def folder(config) -> Path:
    return prepare(config).directory


def error(folder: Path, **options) -> str:
    with pytest.raises(ValueError) as caught:
        open_prepared(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(f"move the folder {folder} to another place and prepare again")
    return message


def test_flipped_bytes_are_found(folder):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for at in (0, len(content) // 2, len(content) - 2):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert str(path) in error(folder)
        path.write_bytes(content)
    open_prepared(folder)


def test_truncated_and_missing_files_are_found_without_reading_them(folder):
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert str(path) in error(folder, verify=False)
        path.unlink()
        assert str(path) in error(folder, verify=False)
        path.write_bytes(content)
    open_prepared(folder)


def test_other_manifests_are_refused(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for content, what in (
        ("[]", "is not a manifest"),
        ("{}", "is not a manifest"),
        (json.dumps(manifest | {"version": 99}), "has format version 99"),
        (json.dumps(manifest | {"dtype": "<u4"}), "does not match its own checksum"),
    ):
        path.write_text(content)
        assert error(folder).startswith(f"{path} {what}")


def test_preparing_again_refuses_damaged_shards(config, folder):
    shard = next(folder.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(ValueError, match=r"train-00000\.bin does not match its sha256; move the folder"):
        prepare(config)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder; run `fusedlm data prepare` first"):
        open_prepared(tmp_path / "none")


def test_more_shards_than_a_process_may_open_files(config):
    text = Path(config.source.path)
    text.write_text("\n--\n".join(f"Document {i}" for i in range(150)))
    directory = prepare(config.model_copy(update={"shard_tokens": 1})).directory
    opened = len(list(Path("/proc/self/fd").iterdir()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
    try:
        prepared = open_prepared(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(prepared.train.shards) > 80
    assert sum(len(tokens) for tokens, _ in prepared.train.documents()) == prepared.train.n_tokens
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
