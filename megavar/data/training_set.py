"""What a fit consumes: token ids with one weight per example, grouped by question, memory-mapped.

An Arrow IPC file rather than Parquet: a step reads random rows, and all ranks of a host share the mapped pages.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from megavar.data.routes import RouteFile, Routes, RouteWriter

_SCHEMA = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_start", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("token_weights", pa.list_(pa.float32()), nullable=False),
    ]
)
_ROWS_PER_BATCH = 1024
TRAINING_SET = "train.arrow"
"""Its file in the directory of a phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence to learn from: `-sum_t w_t log p(ids[t])` over t >= response_start, w_t = weight * token_weights."""

    question_id: str
    ids: np.ndarray
    """int32 [n]: prompt then response."""
    response_start: int
    """Index of the first response token; at least 1."""
    weight: float
    """The objective's weight of this example, negative where it is to be unlearnt; the weights of a question sum to
    the question's mass."""
    token_weights: np.ndarray | None = None
    """float32 [R], a factor per response token; None: 1 for each."""
    experts: Routes | np.ndarray | None = None
    """[m, layers, k], m < n: where the engine routed the first m tokens of a mixture. In memory integers of any type,
    -1 where it is not known; a training set on disk holds uint8 or uint16, see `megavar.data.routes`."""

    @classmethod
    def of(
        cls,
        question_id: str,
        prompt: np.ndarray,
        response: np.ndarray,
        weight: float = 1.0,
        token_weights: np.ndarray | None = None,
        experts: Routes | None = None,
    ) -> Example:
        """The sequence of prompt ids [P] and response ids [R]; of the routes, those of tokens that are computed."""
        ids = np.concatenate([prompt, response])
        return cls(
            question_id=question_id,
            ids=ids,
            response_start=len(prompt),
            weight=weight,
            token_weights=token_weights,
            experts=None if experts is None else experts.first(len(ids) - 1),
        )

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.response_start


def write_training_set(path: Path, examples: Iterable[Example], *, normaliser: float | None = None) -> int:
    """Stream examples to `path`, atomically; examples of a question must be adjacent. Returns their number.

    normaliser: the loss constant C in tokens; None takes the mean response length of the examples,
    each counted once (Appendix C of the paper).

    Routes go to a file of their own beside it, if any example has some.

    Raises:
        ValueError: an example without response, token weights of another length, routes of more tokens than are
            computed, or a question whose examples are not adjacent.
    """
    partial, partial_meta = path.with_name(path.name + ".partial"), path.with_name("meta.partial")
    count = total = 0
    last: str | None = None
    starts: list[int] = []
    seen: set[str] = set()
    rows: list[Example] = []
    with (
        pa.OSFile(str(partial), "wb") as sink,
        pa.ipc.new_file(sink, _SCHEMA) as writer,
        RouteWriter(_routes_path(path)) as routes,
    ):
        for example in examples:
            if not 1 <= example.response_start < len(example.ids):
                raise ValueError(f"question {example.question_id}: an example without prompt or response")
            if example.token_weights is not None and len(example.token_weights) != example.response_length:
                raise ValueError(f"question {example.question_id}: token weights of another length")
            if example.question_id != last:
                if example.question_id in seen:
                    raise ValueError(f"question {example.question_id}: its examples are not adjacent")
                seen.add(example.question_id)
                starts.append(count)
            last = example.question_id
            count, total = count + 1, total + example.response_length
            experts = None if example.experts is None else np.asarray(example.experts)
            if experts is not None and len(experts) >= len(example.ids):
                raise ValueError(f"question {example.question_id}: routes of {len(experts)} tokens")
            routes.append(None if experts is None else Routes.of(experts))
            rows.append(replace(example, experts=None))
            if len(rows) == _ROWS_PER_BATCH:
                writer.write_batch(_batch(rows))
                rows.clear()
        if rows:
            writer.write_batch(_batch(rows))
    meta = {
        "normaliser": normaliser or (total / count if count else 0.0),
        "question_starts": [*starts, count],
    }
    partial_meta.write_text(json.dumps(meta))
    os.replace(partial_meta, _meta_path(path))
    os.replace(partial, path)
    return count


def _batch(rows: list[Example]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(e.ids) for e in rows)], dtype=np.int32)
    ids = pa.ListArray.from_arrays(offsets, np.concatenate([e.ids for e in rows]).astype(np.int32))
    columns = [
        pa.array([e.question_id for e in rows]),
        ids,
        pa.array([e.response_start for e in rows], pa.int32()),
        pa.array([e.weight for e in rows], pa.float32()),
        _token_weights(rows),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _token_weights(rows: list[Example]) -> pa.ListArray:
    """Empty lists stand for None."""
    found = [np.zeros(0) if e.token_weights is None else e.token_weights for e in rows]
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(found).astype(np.float32)))


def _meta_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _routes_path(path: Path) -> Path:
    return path.with_suffix(".experts.arrow")


class TrainingSet:
    """Random access to a file of `write_training_set`, by question, without loading it."""

    def __init__(self, path: Path) -> None:
        self._batches = pa.ipc.open_file(pa.memory_map(str(path)))
        self._routes = RouteFile.open(_routes_path(path))
        meta = json.loads(_meta_path(path).read_text())
        self.normaliser: float = meta["normaliser"]
        """C, in tokens."""
        self._starts: list[int] = meta["question_starts"]

    @property
    def num_questions(self) -> int:
        return len(self._starts) - 1

    @property
    def num_examples(self) -> int:
        return self._starts[-1]

    def examples_of(self, question: int) -> range:
        """Example indices of the question at this position."""
        return range(self._starts[question], self._starts[question + 1])

    def __getitem__(self, index: int) -> Example:
        batch = self._batches.get_batch(index // _ROWS_PER_BATCH)
        row = index % _ROWS_PER_BATCH
        factors = batch["token_weights"][row].values.to_numpy()
        return Example(
            question_id=batch["question_id"][row].as_py(),
            ids=batch["ids"][row].values.to_numpy(),
            response_start=batch["response_start"][row].as_py(),
            weight=batch["weight"][row].as_py(),
            token_weights=factors if len(factors) else None,
            experts=None if self._routes is None else self._routes[index],
        )

    def longest(self) -> int:
        """Tokens of the longest example, prompt included."""
        batches = (self._batches.get_batch(i) for i in range(self._batches.num_record_batches))
        return max((max(b["ids"].value_lengths().to_pylist()) for b in batches), default=0)
