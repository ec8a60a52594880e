"""The text that commands read: one rule in preparation and in `eval --text`, paths in the home folder, streams."""

import gzip
import json
import os
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

RUN = "runs/small"


def evaluated(fusedlm, path) -> dict:
    outcome = fusedlm("eval", RUN, "--text", path, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def refused(outcome) -> str:
    assert outcome.code == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome
    return outcome.err


def test_a_byte_order_mark_is_counted_nowhere(workspace: Path, fusedlm):
    for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        Path(name).write_bytes(mark + "naïve text".encode())
        assert evaluated(fusedlm, name)["bytes"] == 11
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfone two\n--\nthree four five\n--\nsix")
    source = "data.source={type: text, path: marked.txt, separator: '--'}"
    outcome = fusedlm("data", "prepare", "small.yaml", source, "data.split.fraction=0.5")
    assert outcome.code == 0, outcome
    [prepared] = Path("prepared").glob("marked-*")
    splits = json.loads((prepared / "manifest.json").read_text())["splits"]
    assert sum(split["bytes"] for split in splits.values()) == len("one twothree four fivesix")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text with\0NUL", "byte 9 is NUL, which is not text; convert the file or remove it"),
        (b"caf\xe9", "byte 3 (0xe9) is not UTF-8; convert the file or remove it"),
        ("text".encode("utf-16"), "UTF-16 (byte-order mark ff fe); convert it to UTF-8, such as with iconv -f UTF-16"),
        ("text".encode("utf-16-le"), "looks like UTF-16LE; convert it to UTF-8, such as with iconv -f UTF-16LE"),
    ],
)
def test_one_message_for_what_is_not_text(workspace: Path, fusedlm, content, message):
    Path("file.txt").write_bytes(content)
    source = "data.source={type: text, path: file.txt}"
    assert f"error: file.txt: {message}" in refused(fusedlm("data", "prepare", "small.yaml", source))
    assert f"error: --text file.txt: {message}" in refused(fusedlm("eval", RUN, "--text", "file.txt"))


def test_compressed_text_and_a_pipe_are_scored(workspace: Path, fusedlm):
    text = b"one document of text"
    Path("file.txt").write_bytes(text)
    Path("file.txt.gz").write_bytes(gzip.compress(text[:5]) + gzip.compress(text[5:]))
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(text,))
    writer.start()
    scores = [evaluated(fusedlm, name)["bpb"] for name in ("file.txt", "file.txt.gz", "pipe")]
    writer.join()
    assert scores[0] == scores[1] == scores[2]


def test_a_stream_is_prepared_as_its_file_is(workspace: Path, fusedlm):
    """/dev/fd/N of a pipe is what /dev/stdin is after `command |`."""
    reading, writing = os.pipe()
    content = Path("text.txt").read_bytes()
    assert os.write(writing, content) == len(content)
    os.close(writing)
    source = f"data.source={{type: text, path: /dev/fd/{reading}, separator: '---'}}"
    outcome = fusedlm("data", "prepare", "small.yaml", source, "data.dir=streamed")
    os.close(reading)
    assert outcome.code == 0, outcome
    [prepared] = Path("streamed").glob(f"{reading}-*")
    [other] = [path for path in Path("prepared").iterdir() if path.name.startswith("text-")]
    for name in ("train-00000.bin", "validation-00000.bin"):
        assert (prepared / name).read_bytes() == (other / name).read_bytes()


def write_tokenizer(path: Path, normalizer=None) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)} | {"<|endoftext|>": 1100}, []))
    model.normalizer = normalizer
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.save(str(path))


def test_every_path_may_start_in_the_home_folder(workspace: Path, fusedlm, monkeypatch):
    home = workspace / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "text.txt").write_bytes(Path("text.txt").read_bytes())
    (home / "held_out.txt").write_text("held-out text")
    write_tokenizer(home / "tokenizer.json")
    paths = [
        "data.source.path=~/text.txt",
        "data.validation={type: text, path: ~/held_out.txt}",
        "data.tokenizer={type: file, path: ~/tokenizer.json}",
        "data.dir=~/prepared",
    ]
    planned = fusedlm("plan", "small.yaml", *paths, "--json")
    assert json.loads(planned.out)["vocab_size"] == 1101  # the largest id and one, of 257 entries
    prepared = fusedlm("data", "prepare", "small.yaml", *paths)
    assert prepared.code == 0, prepared
    [manifest] = (home / "prepared").glob("text-*/manifest.json")
    assert json.loads(manifest.read_text())["tokenizer"]["vocab_size"] == 1101
    assert not Path("~").exists()
    (home / "scored.txt").write_text("text")
    assert evaluated(fusedlm, "~/scored.txt")["bytes"] == 4


def test_a_tokenizer_that_loses_text_is_refused_before_training(workspace: Path, fusedlm):
    write_tokenizer(Path("lower.json"), normalizers.Lowercase())
    tokenizer = "data.tokenizer={type: file, path: lower.json}"
    for command in (("data", "prepare", "small.yaml"), ("train", "small.yaml", "--out", "new")):
        message = refused(fusedlm(*command, tokenizer))
        assert "text.txt: the tokenizer changes held-out document 1 at byte 0: 'Document" in message
        assert "bits per byte would be wrong; use a tokenizer that keeps every byte" in message
    assert not Path("new", "metrics.jsonl").exists()


def test_runs_and_prepared_text_in_the_data_folder_are_not_read(workspace: Path, fusedlm, caplog):
    """The working directory is the data folder: a recipe, a text, a run and its prepared text."""
    source = "data.source={type: text, path: .}"
    assert fusedlm("data", "prepare", "small.yaml", source, "data.split={type: tail}", "data.dir=prepared").code == 0
    [record] = caplog.records
    assert record.getMessage().startswith(".: left out what fusedlm wrote (prepared/text-")
    assert record.getMessage().endswith(", runs/small)")
    manifests = [json.loads(path.read_text()) for path in Path("prepared").glob("*/manifest.json")]
    assert sorted(manifest["files_read"] for manifest in manifests) == [1, 2]
    message = refused(fusedlm("data", "prepare", "small.yaml", "data.source.path=runs/small"))
    assert "runs/small: a run folder of fusedlm, not text; name the text that it was made from" in message
