"""Part stores: whole or absent, the same bytes for the same rows, bounded memory, keyed reading."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megavar.data import store as store_module
from megavar.data.records import Trace, VersionSpan
from megavar.data.store import PartStore
from megavar.data.traces import LOGPROBS, TRACE_SCHEMA, TraceStore, trace_batch
from megavar.errors import UserError

SCORES = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)


def trace(question: int, index: int, length: int = 7) -> Trace:
    generator = np.random.default_rng([question, index])
    ids = generator.integers(0, 151_936, 3 * length).astype(np.int32)
    return Trace(
        question_id=f"q{question}/ü",
        index=index,
        role="posterior",
        prompt_ids=ids[:length],
        thought_ids=ids[length : 2 * length],
        answer_ids=ids[2 * length :][: index * length],
        thought_logprobs=-generator.exponential(size=length).astype(np.float32),
        answer_logprobs=np.zeros(min(index, 1) * length, dtype=np.float32),
        closed=bool(index % 2),
        finish_reason="stop",
        temperature=0.7,
        top_p=0.9,
        seed=2**62 + index,
        weight_spans=(
            VersionSpan(version="v1", start=0, end=3),
            VersionSpan(version="v2", start=3, end=length),
        )[: index + 1],
    )


def same(left: Trace, right: Trace) -> bool:
    def equal(a, b) -> bool:
        return (a.dtype == b.dtype and np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b

    return all(equal(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(Trace))


def test_traces_come_back_bit_for_bit_in_part_order(tmp_path):
    parts = {number: [trace(10 * number + q, k) for q in range(3) for k in range(3)] for number in (2, 0, 1)}
    store = TraceStore(tmp_path / "traces")
    assert store.parts_done() == set() and list(store.iter_traces()) == []
    for number, traces in parts.items():
        store.write_traces(number, traces)
    assert store.parts_done() == {0, 1, 2}
    read = list(store.iter_traces())
    assert len(read) == 27 and all(map(same, read, parts[0] + parts[1] + parts[2]))
    read[0].thought_ids[0] = 1  # arrays are the reader's own
    fields = {f.name for f in dataclasses.fields(Trace)}
    assert fields - {"experts"} == set(TRACE_SCHEMA.names)  # routes lie in files of their own


def test_the_trace_table_reads_in_pandas(tmp_path):
    TraceStore(tmp_path).write_traces(0, [trace(0, k) for k in range(3)])
    frame = pd.read_parquet(tmp_path / "part-00000.parquet")
    assert frame["index"].tolist() == [0, 1, 2] and frame["closed"].tolist() == [False, True, False]
    assert frame["thought_ids"][1].tolist() == trace(0, 1).thought_ids.tolist()
    assert frame["weight_spans"][0].tolist() == [{"version": "v1", "start": 0, "end": 3}]


def test_a_lossy_array_is_refused(tmp_path):
    wrong = dataclasses.replace(trace(0, 0), thought_logprobs=np.zeros(7))
    with pytest.raises(ValueError, match=r"'thought_logprobs': expected float32 \[n\], got float64 \[7\]"):
        TraceStore(tmp_path).write_traces(0, [wrong])
    assert list(tmp_path.iterdir()) == []


def test_same_rows_give_same_bytes_however_they_are_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "GROUP_ROWS", 5)
    rows = [{"question_id": f"q{n // 4}", "index": n % 4, "score": n / 7} for n in range(23)]
    one, other = PartStore(tmp_path / "one", SCORES), PartStore(tmp_path / "other", SCORES)
    one.write_part(3, rows)
    with other.writer(3) as writer:
        writer.append(rows[:12])
        writer.append([])
        writer.append_batch(pa.RecordBatch.from_pylist(rows[12:], schema=SCORES))
        assert writer.rows == 23
    assert one.part_path(3).read_bytes() == other.part_path(3).read_bytes()
    metadata = pq.read_metadata(one.part_path(3))
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [5, 5, 5, 5, 3]


def test_row_groups_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "GROUP_BYTES", 200_000)
    TraceStore(tmp_path).write_traces(0, (trace(q, 1, length=5_000) for q in range(20)))
    metadata = pq.read_metadata(tmp_path / "part-00000.parquet")
    groups = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    # A trace holds 5 arrays of 5,000 four-byte numbers, so the second one passes the bound.
    assert groups == [2] * 10


def test_an_error_or_a_kill_leaves_no_part(tmp_path):
    store = PartStore(tmp_path, SCORES)
    with pytest.raises(ZeroDivisionError), store.writer(0) as writer:
        writer.append([{"question_id": "q", "index": 0, "score": 1.0}])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    script = """
        import os, signal, sys
        from pathlib import Path
        from megavar.data.traces import TraceStore, trace_batch
        sys.path.insert(0, sys.argv[2])
        from test_store import trace
        store = TraceStore(Path(sys.argv[1]))
        store.write_traces(0, [trace(0, 0)])
        with store.writer(1) as writer:
            writer.append_batch(trace_batch(trace(1, 0)))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(Path(__file__).parent)],
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert killed.returncode == -signal.SIGKILL
    traces = TraceStore(tmp_path)
    assert traces.parts_done() == {0} and len(list(traces.iter_traces())) == 1
    assert traces.remove_torn() == ["part-00001.parquet.tmp"] and traces.remove_torn() == []
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_a_damaged_or_foreign_part_is_named(tmp_path):
    store = PartStore(tmp_path, SCORES)
    store.write_part(0, [{"question_id": "q", "index": 0, "score": 1.0}])
    with pytest.raises(UserError, match="part-00000.parquet: written with other columns"):
        list(TraceStore(tmp_path).iter_traces())
    path = store.part_path(0)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"part-00000.parquet: damaged .*; delete it and run again"):
        store.read_table()


def test_every_damage_that_is_noticed_is_named(tmp_path):
    """One byte changed anywhere: other values, or one clear error."""
    store, rng = PartStore(tmp_path, SCORES), np.random.default_rng(0)
    store.write_part(0, [{"question_id": f"q{i % 7}", "index": i, "score": i / 3} for i in range(40)])
    path, named = store.part_path(0), 0
    whole = path.read_bytes()
    for place, change in zip(rng.integers(0, len(whole), 80), rng.integers(1, 256, 80), strict=True):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        try:
            list(store.iter_batches())
        except UserError as error:
            assert "part-00000.parquet: " in str(error) and "\n" not in str(error)
            named += 1
    assert named > 20


def test_rows_are_read_by_key_and_keys_never_collide(tmp_path):
    store = PartStore(tmp_path, SCORES)
    row = {"question_id": "q", "index": 0, "score": 1.0}
    store.write_part(0, [row, row | {"index": 1, "score": 0.5}])
    assert store.read_keyed(["score"]) == {("q", 0): {"score": 1.0}, ("q", 1): {"score": 0.5}}
    assert store.read_table(["score", "index"]).to_pydict() == {"score": [1.0, 0.5], "index": [0, 1]}
    with pytest.raises(ValueError, match="appears twice"):
        store.write_part(1, [row, row])
    with pytest.raises(ValueError, match=r"columns \['extra'\] are missing or unknown"):
        store.write_part(1, [row | {"extra": 1}])
    with pytest.raises(ValueError, match=r"columns \['score'\] are missing or unknown"):
        store.write_part(1, [{"question_id": "q", "index": 0}])
    with pytest.raises(pa.ArrowException):
        store.write_part(1, [row | {"score": None}])
    assert store.parts_done() == {0}
    store.write_part(1, [row])
    with pytest.raises(ValueError, match="appears twice"):
        store.read_keyed(["score"])


def test_lists_of_numbers_are_read_by_key_as_arrays_of_their_own(tmp_path):
    key = [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
    ]
    schema = pa.schema(
        [*key, pa.field("thought", LOGPROBS, nullable=False), pa.field("words", pa.list_(pa.string()))]
    )
    store = PartStore(tmp_path, schema)
    row = {"question_id": "q", "thought": [-0.5, -1.5], "words": ["a", None]}
    store.write_part(0, [row | {"index": 0}, row | {"index": 1, "thought": [], "words": None}])
    found = store.read_keyed(["thought", "words"])
    first, second = found["q", 0], found["q", 1]
    assert (first["words"], second["words"]) == (["a", None], None)
    np.testing.assert_array_equal(first["thought"], np.array([-0.5, -1.5], np.float32), strict=True)
    np.testing.assert_array_equal(second["thought"], np.empty(0, np.float32), strict=True)
    first["thought"][0] = 0.0  # its own, to be written to
    assert found["q", 0]["thought"].base is None


def test_memory_of_reading_and_writing_is_one_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "GROUP_BYTES", 1 << 20)
    store, count = TraceStore(tmp_path), 300
    arrow = pa.total_allocated_bytes()

    def held() -> int:  # numpy reports to tracemalloc, Arrow to its own pool
        return tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow

    tracemalloc.start()
    try:
        peak = 0
        with store.writer(0) as writer:
            for number in range(count):
                writer.append_batch(trace_batch(trace(number, 1, length=5_000)))
                peak = max(peak, held())
        for _ in store.iter_traces():
            peak = max(peak, held())
    finally:
        tracemalloc.stop()
    total = count * 5 * 5_000 * 4
    assert peak < total / 4, (peak, total)
