"""Rows of .jsonl and .parquet files, streamed; the errors name file and line."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megavar.errors import UserError, in_one_line

_ROWS_AT_ONCE = 64
Row = tuple[str, Mapping[str, Any], Collection[str]]
"""Where the row stands (for errors), its values, and every column name its table has."""


def read_jsonl(path: Path) -> Iterator[Row]:
    """One object a line, empty lines passed over. Raises UserError for text that is not that."""
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
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Of each row the given columns that exist, lists as arrays. Raises UserError for another kind of file."""
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
        raise UserError(f"{path}: not a readable Parquet file: {in_one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {in_one_line(error)}") from None


def _value(scalar: Any) -> Any:
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar)) and scalar.is_valid:
        return scalar.values.to_numpy(zero_copy_only=False)
    return scalar.as_py()
