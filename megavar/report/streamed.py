"""Histograms and samples of a run's Parquet stores, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megavar.data.store import PART, read_part

BINS = 28
_ROWS = 256
MAX_SPECKS = 2000
"""Points of a scatter."""
SPECK_PARTS = 12
"""Parts of a store, evenly spaced, that they are taken from."""


def parts_of(store: Path) -> list[Path]:
    """Finished parts, in order."""
    if not store.is_dir():
        return []
    return sorted(path for path in store.iterdir() if PART.fullmatch(path.name))


def columns_of(store: Path) -> set[str]:
    """Of its first part; none where it has no part."""
    parts = parts_of(store)
    return set(pq.read_schema(parts[0]).names) if parts else set()


def lengths(stores: Sequence[Path], id_columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Finish reason -> int64 [longest + 1]: how many samples have that many tokens in all id columns together."""
    found: dict[str, np.ndarray] = {}
    for part in (part for store in stores for part in parts_of(store)):
        for batch in read_part(part, ["finish_reason", *id_columns], _ROWS):
            each = sum(
                pc.list_value_length(batch[name]).to_numpy(zero_copy_only=False) for name in id_columns
            )
            reasons = np.array(batch["finish_reason"].to_pylist())
            for reason in dict.fromkeys(reasons.tolist()):
                counts = np.bincount(each[reasons == reason])
                found[reason] = _added(found.get(reason, np.zeros(0, np.int64)), counts)
    return found


def binned(counts: np.ndarray, edges: np.ndarray) -> list[int]:
    """Counts of each length, summed into bins (edges[i], edges[i+1]]; the first also has its lower edge."""
    places = np.clip(np.searchsorted(edges, np.arange(len(counts)), side="left") - 1, 0, len(edges) - 2)
    return np.bincount(places, weights=counts, minlength=len(edges) - 1).astype(int).tolist()


def length_edges(longest: int) -> np.ndarray:
    """Whole numbers from 0 on."""
    width = max(1, -(-longest // BINS))
    return np.arange(0, longest + width + 1, width)


def values(store: Path, column: str) -> tuple[np.ndarray, list[int]]:
    """Edges [B+1] and counts [B] of a float column, NaN left out; its range is read from the files' statistics."""
    low, high = np.inf, -np.inf
    for part in parts_of(store):
        told = pq.read_metadata(part)
        place = told.schema.names.index(column)
        for group in range(told.num_row_groups):
            statistics = told.row_group(group).column(place).statistics
            if statistics is not None and statistics.has_min_max:
                low, high = min(low, statistics.min), max(high, statistics.max)
    if not np.isfinite([low, high]).all():
        return np.array([0.0, 1.0]), [0]
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    counts = np.zeros(BINS, np.int64)
    for part in parts_of(store):
        for batch in read_part(part, [column], _ROWS):
            counts += np.histogram(batch[column].to_numpy(zero_copy_only=False), edges)[0]
    return edges, counts.tolist()


def effective_sizes(store: Path, traces: int) -> tuple[np.ndarray, list[int]]:
    """Edges and counts of 1 / sum rho~^2 over questions with weight."""
    edges = np.linspace(1, max(traces, 2), min(BINS, 4 * max(traces - 1, 1)) + 1)
    counts = np.zeros(len(edges) - 1, np.int64)
    for part in parts_of(store):
        squares: dict[str, float] = {}
        for batch in read_part(part, ["question_id", "normalised"], _ROWS):
            for key, share in zip(
                batch["question_id"].to_pylist(), batch["normalised"].to_pylist(), strict=True
            ):
                squares[key] = squares.get(key, 0.0) + share * share
        sizes = np.array([1 / s for s in squares.values() if s > 0])
        counts += np.histogram(np.clip(sizes, 1, edges[-1]), edges)[0]
    return edges, counts.tolist()


@dataclass(frozen=True, slots=True)
class Gaps:
    engine: np.ndarray
    """float32 [n], log-probs that the engine recorded."""
    trainer: np.ndarray
    """float32 [n], the trainer's, of the same tokens."""


def gaps(traces: Path, scores: Path) -> Gaps:
    """At most MAX_SPECKS tokens of closed thoughts, evenly spaced within SPECK_PARTS parts: the same on every call."""
    both = [part for part in parts_of(scores) if (traces / part.name).exists()]
    chosen = [both[i] for i in _spaced(len(both), SPECK_PARTS)]
    engine, trainer = [], []
    for part in chosen:
        sides = [
            np.concatenate(found) if found else np.zeros(0, np.float32) for found in _thoughts(traces, part)
        ]
        kept = _spaced(len(sides[0]), MAX_SPECKS // len(chosen))
        engine.append(sides[0][kept])
        trainer.append(sides[1][kept])
    empty = [np.zeros(0, np.float32)]
    return Gaps(np.concatenate(engine or empty), np.concatenate(trainer or empty))


def _thoughts(traces: Path, scores: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """One part's log-probs of the thoughts that were scored, by engine and by trainer: at most MAX_SPECKS a thought.

    Scores are in the order of the traces and lack the open ones.
    """
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    scored = _rows(scores, "thought")
    wanted = next(scored, None)
    for key, values in _rows(traces / scores.name, "thought_logprobs"):
        if wanted is not None and wanted[0] == key:
            place = _spaced(len(values), MAX_SPECKS)
            sides[0].append(values[place])
            sides[1].append(wanted[1][place])
            wanted = next(scored, None)
    return sides


def _rows(part: Path, column: str) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    for batch in read_part(part, ["question_id", "index", column], _ROWS):
        names = dict(zip(batch.schema.names, batch.columns, strict=True))
        ends, flat = names[column].offsets.to_numpy(), names[column].values.to_numpy()
        keys = zip(names["question_id"].to_pylist(), names["index"].to_pylist(), strict=True)
        for row, key in enumerate(keys):
            yield key, flat[ends[row] : ends[row + 1]]


def _spaced(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spaced places of `count`."""
    return (
        np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
        if count
        else np.zeros(0, np.int64)
    )


def _added(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    total = np.zeros(max(len(first), len(second)), np.int64)
    total[: len(first)] += first
    total[: len(second)] += second
    return total
