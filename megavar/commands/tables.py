"""Rows from and to .jsonl and .parquet files: streamed, and written under their name only when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from megavar.errors import UserError

SUFFIXES = (".jsonl", ".parquet")
_ROWS_AT_ONCE = 64
Row = tuple[str, Mapping[str, Any], Collection[str]]
"""Where the row stands (for errors), its values, and every column name its table has."""


def check_suffix(path: Path) -> None:
    """Raises UserError unless the file is of a kind that can be read and written here."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(SUFFIXES)}")


def check_output(path: Path) -> None:
    """Raises UserError unless `path` names a table in a directory that can be written."""
    check_suffix(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{path.absolute().parent} is no writable directory; make it or choose another")


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file; of Parquet only the given columns, its lists as arrays.

    Raises UserError for a missing or malformed file, naming the line.
    """
    check_suffix(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    yield from _read_parquet(path, columns) if path.suffix == ".parquet" else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: expected one JSON object a line, got {type(row).__name__}")
                yield where, row, row.keys()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            # With none of the columns all are read: the first row's error names those there are.
            wanted = [name for name in columns if name in names] or None
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=wanted, use_threads=False):
                for index in range(batch.num_rows):
                    values = {name: _value(batch[name][index]) for name in batch.schema.names}
                    yield f"{path} row {number}", values, names
                    number += 1
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def _value(scalar: Any) -> Any:
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar)) and scalar.is_valid:
        return scalar.values.to_numpy(zero_copy_only=False)
    return scalar.as_py()


class TableWriter:
    """Record batches into a .jsonl or .parquet file that replaces `path` when the block ends well."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._partial = path.with_name(f".{path.name}.partial")
        self._parquet: pq.ParquetWriter | None = None
        self._lines: IO[str] | None = None

    def __enter__(self) -> Self:
        if self._path.suffix == ".parquet":
            self._parquet = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        else:
            self._lines = self._partial.open("w", encoding="utf-8")
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        if self._parquet is not None:
            self._parquet.write_batch(batch)
        elif self._lines is not None:
            self._lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in (self._parquet, self._lines):
            if sink is not None:
                sink.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)
