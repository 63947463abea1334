"""Completions from an engine, into stores, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megavar.data.records import VersionSpan
from megavar.data.routes import RouteSpill
from megavar.data.store import PartStore
from megavar.data.traces import IDS, TraceStore
from megavar.phases.run import OpenPhase, Run, largest_over_ranks, total_over_ranks
from megavar.phases.syncing import bring_weights
from megavar.rollout.engine import Completion, Engine, Request, SamplingParams
from megavar.rollout.metrics import RolloutMeter
from megavar.rollout.overlap import token_staleness
from megavar.rollout.roles import SampledRole
from megavar.rollout.sglang import SGLangEngine
from megavar.runs import Phase

ANSWERS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("answer_index", pa.int32(), nullable=False),
        pa.field("ids", IDS, nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)
"""Answers sampled after a trace; `ids` [A] begin with the template's `answer_start`, which was forced."""


def trace_store(phase: Phase) -> TraceStore:
    return TraceStore(phase.path / "traces")


def answer_store(phase: Phase) -> PartStore:
    return PartStore(phase.path / "answers", ANSWERS, key=("question_id", "index", "answer_index"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A phase of sampling: what is asked of which weights, and where completions go."""

    name: str
    weights: Phase
    role: SampledRole
    config: dict[str, Any]
    inputs: Sequence[Phase]
    params: SamplingParams
    parts: int
    requests: Callable[[int], list[Request]]
    store: Callable[[Phase], PartStore]
    write: Callable[[PartStore, int, list[Request], list[Completion]], None]
    id_columns: tuple[str, ...]
    newer: Mapping[str, int] | None = None
    """Name of weights -> how many versions newer than them there were when these samples were asked for; logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What one rank sampled of a phase in this process."""

    tokens: int = 0
    seconds: float = 0.0
    began: float = 0.0
    """time.monotonic()."""
    waited: float = 0.0
    """Seconds that the rank stood still for it."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of the engine, where it is servers."""


def sample(run: Run, sampling: Sampling, ahead: Filled | None = None) -> Phase:
    """The phase of a sampling, done. ahead: what this rank has of it already, see `sample_ahead`."""
    with run.phase(sampling.name, config=sampling.config, inputs=sampling.inputs) as opened:
        if opened.todo:
            store = sampling.store(opened.phase)
            done = len(store.parts_done())
            opened.metrics |= bring_weights(
                run, sampling.role, sampling.weights, wanted=ahead is None and done < sampling.parts
            )
            with run.progress.phase(sampling.name, sampling.parts, "parts", done=done) as task:

                def advance() -> None:
                    # Only the first rank shows progress; the others keep its pace.
                    task.advance(min(run.samplers, sampling.parts - task.done))

                filled = ahead or fill(run, sampling, opened.phase, advance)
                tokens = total_over_ranks({"tokens": filled.tokens})["tokens"]
                task.advance(sampling.parts - task.done)
            seconds = largest_over_ranks(filled.seconds)
            opened.metrics["rollout/tokens_per_second"] = tokens / seconds if seconds else 0.0
            opened.metrics |= filled.metrics
            if ahead and ahead.began:
                opened.metrics["rollout/ahead_seconds"] = opened.phase.started - ahead.began
                opened.metrics["rollout/waited_seconds"] = ahead.waited
            _count(opened, sampling)
    return opened.phase


def sample_ahead(run: Run, sampling: Sampling, stopped: Callable[[], bool]) -> Filled | None:
    """Fill the store of a phase that is not opened yet; None where nothing is left to do.

    Not collective, so a thread may call it while the rank trains; `sample` then finds its parts done. stopped: asked
    now and then; true ends the work.
    """
    phase = run.open_early(sampling.name, config=sampling.config, inputs=sampling.inputs)
    return None if phase is None else fill(run, sampling, phase, lambda: None, stopped)


def fill(
    run: Run,
    sampling: Sampling,
    phase: Phase,
    advance: Callable[[], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Filled:
    """Sample this rank's missing parts into the store. Not collective."""
    store, ranks, began = sampling.store(phase), run.samplers, time.monotonic()
    done = store.parts_done()
    mine = [p for p in range(sampling.parts) if p % ranks == run.groups.rank and p not in done]
    if not mine:
        return Filled()
    # A server fleet takes all parts as one stream, so that no tail of a part leaves it idle. Batches of the
    # in-process engine end with the part, so that its bytes depend neither on ranks nor on resumption.
    streams = [[part] for part in mine] if run.recipe.rollout.engine == "local" else [mine]
    weights = sampling.weights
    tokens, metrics = 0, dict[str, Any]()
    with run.engines.using(sampling.role, weights.path / "hf", weights.name) as engine:
        started = time.monotonic()
        if isinstance(engine, SGLangEngine):
            engine.meter = RolloutMeter()  # what it tells of is this phase
        for stream in streams:
            for part, asked, completions in _whole_parts(engine, stream, sampling, stopped, store.directory):
                tokens += sum(len(c.ids) for c in completions)
                sampling.write(store, part, asked, completions)
                advance()
        if isinstance(engine, SGLangEngine):
            metrics = engine.metrics()
    return Filled(tokens=tokens, seconds=time.monotonic() - started, began=began, metrics=metrics)


def _whole_parts(
    engine: Engine,
    parts: Sequence[int],
    sampling: Sampling,
    stopped: Callable[[], bool],
    scratch: Path,
) -> Iterator[tuple[int, list[Request], list[Completion]]]:
    """Generate all parts as one stream and yield each as soon as its last completion is there.

    Holds the parts that are under way: as many as the engine keeps requests in flight. Their routes wait in
    nameless files in `scratch`.
    """
    spills: dict[int, RouteSpill] = {}
    asked: dict[int, list[Request]] = {}
    found: dict[int, list[Completion]] = {}
    left: dict[int, int] = {}  # completions that a part still waits for
    part_of: dict[str, int] = {}
    empty: list[int] = []

    def stream() -> Iterator[Request]:
        for part in parts:
            wanted = sampling.requests(part)
            if not wanted:
                empty.append(part)
                continue
            asked[part], found[part] = wanted, []
            left[part] = sum(len(request.seeds) for request in wanted)
            part_of.update((request.id, part) for request in wanted)
            yield from wanted

    for completion in engine.generate(stream(), sampling.params):
        if stopped():
            return
        part = part_of[completion.request_id]
        if completion.experts is not None:
            spill = spills.get(part) or spills.setdefault(part, RouteSpill(scratch))
            completion = replace(completion, experts=spill.keep(completion.experts))
        found[part].append(completion)
        left[part] -= 1
        if not left[part]:
            wanted, completions = asked.pop(part), found.pop(part)
            spills.pop(part, None)
            place = {request.id: n for n, request in enumerate(wanted)}
            completions.sort(key=lambda c: (place[c.request_id], c.index))
            for request in wanted:
                del part_of[request.id]
            yield part, wanted, completions
    for part in empty:
        yield part, [], []


def _count(opened: OpenPhase, sampling: Sampling) -> None:
    """Counts of the whole store, streamed, on the rank that writes the manifest."""
    store, id_columns = sampling.store(opened.phase), sampling.id_columns
    if not opened.phase.writer:
        opened.counts = {"rows": 0, "open": 0}
        return
    counts = dict.fromkeys(("rows", "truncated", "open", *id_columns), 0)
    flags = [name for name in ("closed",) if name in store.schema.names]
    spans = ["weight_spans"] if sampling.newer is not None else []
    behind = np.zeros(3)  # tokens, tokens times versions behind, most versions behind
    for batch in store.iter_batches(["finish_reason", *flags, *spans, *id_columns]):
        counts["rows"] += batch.num_rows
        counts["truncated"] += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py() or 0
        if flags:
            counts["open"] += batch.num_rows - (pc.sum(batch["closed"]).as_py() or 0)
        for name in id_columns:
            counts[name] += pc.sum(pc.list_value_length(batch[name])).as_py() or 0
        if sampling.newer is not None:
            for row in batch["weight_spans"].to_pylist():
                behind = _behind(behind, [VersionSpan(**span) for span in row], sampling.newer)
    rows = max(counts["rows"], 1)
    opened.metrics["rollout/truncation_rate"] = counts["truncated"] / rows
    opened.metrics["rollout/mean_tokens"] = sum(counts[name] for name in id_columns) / rows
    if flags:
        opened.metrics["rollout/open_rate"] = counts["open"] / rows
    if sampling.newer is not None:
        opened.metrics["rollout/staleness_mean"] = behind[1] / max(behind[0], 1)
        opened.metrics["rollout/staleness_max"] = int(behind[2])
    opened.counts = counts


def _behind(seen: np.ndarray, spans: list[VersionSpan], newer: Mapping[str, int]) -> np.ndarray:
    """`seen` with the tokens of one completion."""
    mean, worst = token_staleness(spans, {version: -count for version, count in newer.items()}, 0)
    tokens = spans[-1].end if spans else 0
    return np.array([seen[0] + tokens, seen[1] + mean * tokens, max(seen[2], worst)])
