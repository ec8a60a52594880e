"""Text columns of Parquet files, and one-line errors for damage."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusedlm.config.data import ParquetSource
from fusedlm.data.sources import open_source


def texts(path, column="text") -> list[str]:
    return [document.text for document in open_source(ParquetSource(path=str(path), column=column)).documents()]


def error(path, column="text") -> str:
    with pytest.raises(ValueError) as caught:
        texts(path, column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_row_groups_and_files_in_order(tmp_path):
    table = pa.table({"id": range(5), "body": [f"document {i}" for i in range(5)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(pa.table({"body": pa.array(["x", "x"])}), tmp_path / "b.parquet")
    assert texts(tmp_path, "body") == [f"document {i}" for i in range(5)] + ["x", "x"]


TYPES = [pa.string(), pa.large_string(), pa.string_view()]
TYPES += [pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_type_of_text(tmp_path, kind):
    words = ["a", "longer than twelve bytes", "\u00fc", "a", ""]
    pq.write_table(pa.table({"text": pa.array(words).cast(kind)}), tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet") == words


def test_nested_fields_are_named_with_dots(tmp_path):
    path = tmp_path / "a.parquet"
    meta = pa.array([{"text": "one", "deep": {"er.x": "1"}}, {"text": "two", "deep": {"er.x": "2"}}])
    pq.write_table(pa.table({"text": ["no", "no"], "meta": meta, "id": [1, 2]}), path)
    assert texts(path, "meta.text") == ["one", "two"]
    assert texts(path, "meta.deep.er.x") == ["1", "2"]
    assert "no column 'meta.txt'; columns here: 'text', 'meta', 'id'" in error(path, "meta.txt")
    assert "no column 'id.text'" in error(path, "id.text")
    assert "column 'meta' is struct<" in error(path, "meta")
    pq.write_table(pa.table({"meta": meta, "meta.text": ["dotted", "name"]}), path)
    assert texts(path, "meta.text") == ["dotted", "name"]
    pq.write_table(pa.table({"meta": pa.array([{"text": "one"}, None])}), path)
    assert error(path, "meta.text") == f"{path}, row 1: column 'meta.text' is null, not text"


def test_damaged_files_and_missing_columns_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"] * 100, "id": range(100), "raw": [b"x"] * 100}), path)
    assert "no column 'body'; columns here: 'text', 'id', 'raw'" in error(path, "body")
    assert "column 'id' is int64, not text" in error(path, "id")
    assert "column 'raw' is binary, not text" in error(path, "raw")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"plain text, and no Parquet at all"):
        path.write_bytes(damaged)
        assert error(path).startswith(f"{path}: truncated or damaged Parquet file")


def test_cells_that_are_not_text_are_located(tmp_path):
    path = tmp_path / "a.parquet"
    for value, found in ((None, " is null, not text"), ("a\0", ": character 1 is NUL, which is not text; convert")):
        pq.write_table(pa.table({"text": ["a", value]}), path)
        assert error(path).startswith(f"{path}, row 1: column 'text'{found}")
    cells = pa.Array.from_buffers(pa.string(), 1, pa.array([b"ab\xff"]).buffers())
    pq.write_table(pa.table({"text": cells}), path)
    assert error(path) == f"{path}, row 0: column 'text': byte 2 is not UTF-8"


@pytest.mark.parametrize("dictionary", [True, False])
def test_flipped_bits_are_found_by_the_checksums_of_pages(tmp_path, dictionary):
    path = tmp_path / "a.parquet"
    words = [f"document {i % 40} of {i * i} words" for i in range(300)]
    pq.write_table(pa.table({"text": words}), path, write_page_checksum=True, use_dictionary=dictionary)
    content = path.read_bytes()
    assert texts(path) == words
    random.seed(0)
    found = 0
    for _ in range(200):
        flipped = bytearray(content)
        flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        try:
            assert texts(path) == words
        except ValueError as refused:
            assert str(refused).startswith(f"{path}") and "\n" not in str(refused)
            found += 1
    assert found > 100
