"""Texts in a column of a table: Parquet, and the Arrow files of a folder that Hugging Face's `datasets` saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = (".parquet", ".arrow")
BESIDE = ("dataset_dict.json", "dataset_info.json", "state.json")  # what `datasets` writes beside its Arrow files
_ROWS = 256  # that are read at once


def rows(path: Path, column: str) -> Iterator[str]:
    """The column's texts, in their order, a few at a time. ValueError for a file that is no such table, for a column
    that it lacks or that holds no text, and for a row without one."""
    number = 0
    with _batches(path, column) as batches:
        for batch in batches:
            try:
                texts = batch.to_pylist()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, rows {number} to {number + len(batch) - 1}: {error}") from None
            for text in texts:
                if text is None:
                    raise ValueError(f"{path}, row {number} has no text in {column!r}")
                yield text
                number += 1


@contextmanager
def _batches(path: Path, column: str) -> Iterator[Iterator[Any]]:
    """Arrays of the column's texts."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ValueError(f"{path} is read by pyarrow, which is not installed: pip install pyarrow") from None
    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as table:  # else a row group at once
                _hold(path, table.schema_arrow, column)
                yield (batch.column(column) for batch in table.iter_batches(_ROWS, columns=[column]))
        else:
            with arrow.memory_map(str(path)) as file, _reader(arrow, file) as table:
                _hold(path, table.schema, column)
                yield (batch.column(column) for batch in _in_order(table))
    except (arrow.ArrowException, OSError) as error:  # a stream that was cut is the latter
        raise ValueError(f"{path} is no {path.suffix.removeprefix('.')} file that can be read: {error}") from None


def _reader(arrow: Any, file: Any) -> Any:
    """`datasets` writes a stream; a file of Arrow's other format begins with its name."""
    named = file.read(6) == b"ARROW1"
    file.seek(0)
    return arrow.ipc.open_file(file) if named else arrow.ipc.open_stream(file)


def _in_order(table: Any) -> Iterator[Any]:
    if hasattr(table, "num_record_batches"):
        return (table.get_batch(number) for number in range(table.num_record_batches))
    return iter(table)


def _hold(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}, but {', '.join(schema.names)}: name one by --column")
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"{path}: the column {column!r} holds {kind}, no text")
