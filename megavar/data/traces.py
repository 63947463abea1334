"""The store of traces: explicit columns, readable as they are in pandas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from megavar.data.records import Trace, VersionSpan
from megavar.data.routes import RouteFile, RouteWriter
from megavar.data.store import PartStore, values


def _column(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
LOGPROBS = pa.list_(pa.field("element", pa.float32(), nullable=False))
SPAN = pa.struct([_column("version", pa.string()), _column("start", pa.int32()), _column("end", pa.int32())])
TRACE_SCHEMA = pa.schema(
    [
        _column("question_id", pa.string()),
        _column("index", pa.int32()),
        _column("role", pa.string()),
        _column("prompt_ids", IDS),
        _column("thought_ids", IDS),
        _column("answer_ids", IDS),
        _column("thought_logprobs", LOGPROBS),
        _column("answer_logprobs", LOGPROBS),
        _column("closed", pa.bool_()),
        _column("finish_reason", pa.string()),
        _column("temperature", pa.float64()),
        _column("top_p", pa.float64()),
        _column("seed", pa.int64()),
        _column("weight_spans", pa.list_(pa.field("element", SPAN, nullable=False))),
    ]
)
_ARRAYS = {field.name: field.type for field in TRACE_SCHEMA if field.type in (IDS, LOGPROBS)}


class TraceStore(PartStore):
    """Traces keyed by (question_id, index); rows are `Trace`s instead of mappings.

    Routes, where traces have any, lie beside each part in a file of their own: most readers want none.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, TRACE_SCHEMA)

    def write_traces(self, index: int, traces: Iterable[Trace]) -> None:
        """Write a whole part, replacing it if it is there; its routes are whole before it is."""
        with self.writer(index) as writer, RouteWriter(self._routes_path(index)) as routes:
            for trace in traces:
                writer.append_batch(trace_batch(trace))
                routes.append(trace.experts)

    def iter_traces(self, *, parts: Iterable[int] | None = None) -> Iterator[Trace]:
        """The traces of the given parts, by default of all, in part order, each with arrays of its own; holds
        one row group at a time. Routes are read when they are looked at."""
        for part in sorted(self.parts_done() if parts is None else parts):
            routes, row = RouteFile.open(self._routes_path(part)), 0
            for batch in self.iter_batches(parts=[part]):
                yield from _traces(batch, routes, row)
                row += batch.num_rows

    def _routes_path(self, index: int) -> Path:
        return self.part_path(index).with_suffix(".experts.arrow")


def trace_batch(trace: Trace) -> pa.RecordBatch:
    """One row of `TRACE_SCHEMA`. Raises ValueError for arrays of another shape or a lossy type."""
    columns: list[pa.Array] = []
    for field in TRACE_SCHEMA:
        value = getattr(trace, field.name)
        if field.name in _ARRAYS:
            columns.append(_list_column(field, value))
        elif field.name == "weight_spans":
            spans = [{"version": span.version, "start": span.start, "end": span.end} for span in value]
            columns.append(pa.array([spans], type=field.type))
        else:
            columns.append(pa.array([value], type=field.type))
    return pa.RecordBatch.from_arrays(columns, schema=TRACE_SCHEMA)


def _list_column(field: pa.Field, value: np.ndarray) -> pa.Array:
    target = np.dtype(field.type.value_type.to_pandas_dtype())
    if value.ndim != 1 or value.dtype != target:
        raise ValueError(
            f"trace field {field.name!r}: expected {target} [n], got {value.dtype} {list(value.shape)}"
        )
    return pa.ListArray.from_arrays(
        np.array([0, len(value)], dtype=np.int32), pa.array(value), type=field.type
    )


def _traces(batch: pa.RecordBatch, routes: RouteFile | None, first: int) -> Iterator[Trace]:
    """first: row of the batch's first trace in its part."""
    columns = {name: values(batch.column(name)) for name in TRACE_SCHEMA.names}
    for row in range(batch.num_rows):
        fields = {name: column[row] for name, column in columns.items()}
        fields["weight_spans"] = tuple(VersionSpan(**span) for span in fields["weight_spans"])
        yield Trace(**fields, experts=None if routes is None else routes[first + row])
