"""One text column of a Parquet file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from fusedlm.data.text_files import refuse_nul

_ROWS = 1024
_TEXT_TYPES = ("string", "large_string", "string_view")


def read_cells(path: Path, column: str) -> Iterator[tuple[str, str]]:
    """Yields (text, place) of each row. Checksums of pages are verified where the file has them.

    Args:
        column: its name, or the names of structs and a field in them, joined by dots.

    Raises:
        ValueError: the file is damaged, has no such column, or a cell is not text; names the file and the row.
    """
    try:
        with (
            contextlib.nullcontext(path) if isinstance(path, Path) else path.open("rb") as content,
            pyarrow.parquet.ParquetFile(content, page_checksum_verification=True) as file,
        ):
            names = _column_path(file.schema_arrow, path, column)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[".".join(names)]):
                    for value in _select(batch, names):
                        place = f"{path}, row {row}"
                        yield _text(value, place, column), place
                        row += 1
            if row != file.metadata.num_rows:
                raise _damaged(path, f"{row} rows instead of {file.metadata.num_rows}")
    except pyarrow.ArrowException as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, error) from None


def _column_path(schema: pyarrow.Schema, path: Path, column: str) -> list[str]:
    """Names from the schema down to the column: its own name if there is one, dots in it or not."""
    found = _find(schema, column)
    if found is None:
        known = ", ".join(map(repr, schema.names[:8])) or "none"
        raise ValueError(f"{path}: no column {column!r}; columns here: {known}")
    names, kind = found
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in _TEXT_TYPES:
        raise ValueError(f"{path}: column {column!r} is {kind}, not text")
    return names


def _find(fields, column: str) -> tuple[list[str], pyarrow.DataType] | None:
    """`fields`: a schema or a struct type."""
    if (index := fields.get_field_index(column)) >= 0:
        return [column], fields.field(index).type
    for at in (at for at, character in enumerate(column) if character == "."):
        index = fields.get_field_index(column[:at])
        if index >= 0 and pyarrow.types.is_struct(fields.field(index).type):
            below = _find(fields.field(index).type, column[at + 1 :])
            if below is not None:
                return [column[:at], *below[0]], below[1]
    return None


def _select(batch: pyarrow.RecordBatch, names: list[str]) -> pyarrow.Array:
    array = batch.column(batch.schema.get_field_index(names[0]))
    for name in names[1:]:
        array = pyarrow.compute.struct_field(array, [array.type.get_field_index(name)])
    return array


def _text(value: pyarrow.Scalar, place: str, column: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: column {column!r}: byte {error.start} is not UTF-8") from None
    if text is None:
        raise ValueError(f"{place}: column {column!r} is null, not text")
    refuse_nul(text, f"{place}: column {column!r}")
    return text


def _damaged(path: Path, error: object) -> ValueError:
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{path}: truncated or damaged Parquet file ({what})")
