"""Stores of numbered Parquet parts: what a phase has written, what it has not, and nothing half-written.

A store is a directory of `part-00000.parquet`, `part-00001.parquet`, ... A part is written under a temporary
name, synced to disk and renamed, so it is either whole or absent and a killed phase goes on from
`parts_done()`. The same rows appended in the same order give the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megavar.errors import UserError, in_one_line

PART = re.compile(r"part-(\d{5,})\.parquet")
TORN_SUFFIX = ".tmp"
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for bytes that are not what they were."""
GROUP_ROWS, GROUP_BYTES = 1024, 32 << 20
"""A row group is flushed at this many rows or Arrow bytes, whichever comes first."""


class PartWriter:
    """Appends rows to one part; the part appears when the `with` block ends well, and not at all
    otherwise."""

    def __init__(self, path: Path, schema: pa.Schema, key: Sequence[str]) -> None:
        self.path = path
        self.rows = 0
        """Rows appended so far."""
        self._schema, self._key = schema, tuple(key)
        self._seen: set[tuple] = set()
        self._batches: list[pa.RecordBatch] = []
        self._pending_rows = self._pending_bytes = 0

    def __enter__(self) -> PartWriter:
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed in __exit__
        self._parquet = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="zstd",
            # Dictionaries pay for repeated strings; ids and log-probs hardly repeat within a page.
            use_dictionary=[field.name for field in self._schema if pa.types.is_string(field.type)],
        )
        return self

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; each has exactly the schema's columns. Raises ValueError for other columns or a repeated
        key."""
        rows = list(rows)
        names = set(self._schema.names)
        for row in rows:
            if row.keys() != names:
                raise ValueError(
                    f"{self.path.name}: columns {sorted(row.keys() ^ names)} are missing or unknown"
                )
        if rows:
            self.append_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))

    def append_batch(self, batch: pa.RecordBatch) -> None:
        """Add a record batch of the store's schema."""
        keys = list(zip(*(batch.column(name).to_pylist() for name in self._key), strict=True))
        for key in keys:
            if key in self._seen:
                raise ValueError(
                    f"{self.path.name}: key {dict(zip(self._key, key, strict=True))} appears twice"
                )
            self._seen.add(key)
        # One row at a time decides where a row group ends, so the bytes do not depend on how rows were
        # grouped.
        for row in range(batch.num_rows):
            piece = batch.slice(row, 1)
            self._batches.append(piece)
            self._pending_rows += 1
            self._pending_bytes += piece.nbytes
            if self._pending_rows >= GROUP_ROWS or self._pending_bytes >= GROUP_BYTES:
                self._flush()
        self.rows += batch.num_rows

    def _flush(self) -> None:
        if self._batches:
            table = pa.Table.from_batches(self._batches, schema=self._schema).combine_chunks()
            self._parquet.write_table(table, row_group_size=table.num_rows)
            self._batches, self._pending_rows, self._pending_bytes = [], 0, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._parquet.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._flush()
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(self.path.name + TORN_SUFFIX)


class PartStore:
    """A directory of Parquet parts with one schema, keyed by `key`.

    One process writes a given part at a time; any number may read finished parts.
    """

    def __init__(
        self, directory: Path, schema: pa.Schema, *, key: Sequence[str] = ("question_id", "index")
    ) -> None:
        self.directory, self.schema, self.key = Path(directory), schema, tuple(key)
        unknown = set(self.key) - set(schema.names)
        if unknown:
            raise ValueError(f"key columns {sorted(unknown)} are not in the schema {schema.names}")

    def part_path(self, index: int) -> Path:
        return self.directory / f"part-{index:05d}.parquet"

    def writer(self, index: int) -> PartWriter:
        """A writer of part `index`, for rows that come one by one; holds at most one row group."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return PartWriter(self.part_path(index), self.schema, self.key)

    def write_part(self, index: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a whole part, replacing it if it is there."""
        with self.writer(index) as writer:
            for row in rows:
                writer.append((row,))

    def parts_done(self) -> set[int]:
        """Indices of finished parts."""
        if not self.directory.is_dir():
            return set()
        matches = (PART.fullmatch(path.name) for path in self.directory.iterdir())
        return {int(match[1]) for match in matches if match}

    def remove_torn(self) -> list[str]:
        """Delete what writers that were killed left behind, and name it. Only for the process that owns the
        store."""
        if not self.directory.is_dir():
            return []
        torn = sorted(self.directory.glob(f"part-*{TORN_SUFFIX}"))
        for path in torn:
            path.unlink()
        return [path.name for path in torn]

    def iter_batches(
        self,
        columns: Sequence[str] | None = None,
        batch_rows: int = 64,
        *,
        parts: Iterable[int] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Record batches of the given parts, by default of every finished one, in part order.

        Memory: one row group of the columns read. Raises UserError for a damaged part or another schema.
        """
        for index in sorted(self.parts_done() if parts is None else parts):
            names = self.schema.names if columns is None else columns
            yield from read_part(self.part_path(index), names, batch_rows, schema=self.schema)

    def read_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All finished parts as one table, in part order; for columns that fit in memory."""
        names = self.schema.names if columns is None else columns
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches(list(self.iter_batches(names, batch_rows=65536)), schema=schema)

    def read_keyed(
        self, columns: Sequence[str], *, parts: Iterable[int] | None = None
    ) -> dict[tuple, dict[str, Any]]:
        """Key -> the named columns of its row, of the given parts or of all; see `values`. Raises ValueError if two
        parts hold the same key."""
        rows: dict[tuple, dict[str, Any]] = {}
        for batch in self.iter_batches([*dict.fromkeys([*self.key, *columns])], parts=parts):
            found = {name: values(batch.column(name)) for name in batch.schema.names}
            for key, *row in zip(
                zip(*(found[name] for name in self.key), strict=True),
                *(found[name] for name in columns),
                strict=True,
            ):
                if key in rows:
                    raise ValueError(
                        f"{self.directory}: key {dict(zip(self.key, key, strict=True))} appears twice"
                    )
                rows[key] = dict(zip(columns, row, strict=True))
        return rows


def read_part(
    path: Path, columns: Sequence[str], batch_rows: int, *, schema: pa.Schema | None = None
) -> Iterator[pa.RecordBatch]:
    """Record batches of the columns, in their order; holds one row group of them.

    schema: what the part must have been written with. Raises UserError for a damaged part or another schema.
    """
    names = list(columns)
    try:
        with pq.ParquetFile(path) as part:
            if schema is not None and not part.schema_arrow.equals(schema):
                raise UserError(
                    f"{path}: written with other columns than this version reads; start a new run"
                )
            # One row group at a time: over several, pyarrow's reader keeps what it has passed.
            for group in range(part.num_row_groups):
                for batch in part.iter_batches(
                    batch_rows, row_groups=[group], columns=names, use_threads=False
                ):
                    yield batch.select(names)
    except _DAMAGE as error:
        raise UserError(f"{path}: damaged ({in_one_line(error)}); delete it and run again") from error


def values(column: pa.Array) -> list[Any]:
    """The rows of a column as Python values, but lists of numbers as arrays of their own."""
    if not pa.types.is_list(column.type) or not pa.types.is_primitive(column.type.value_type):
        return column.to_pylist()
    starts, numbers = column.offsets.to_numpy(), column.values.to_numpy()
    # Copies: views would be read-only and keep the whole batch alive.
    return [numbers[start:end].copy() for start, end in pairwise(starts)]
