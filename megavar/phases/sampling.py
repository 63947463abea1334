"""Traces and answers from an engine, into stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megavar.data.records import Question, Role, Trace
from megavar.data.store import PartStore
from megavar.data.templates import Encoder
from megavar.data.traces import IDS, TraceStore
from megavar.phases.engines import engine_with, samplers
from megavar.phases.run import OpenPhase, Run, sampling_seeds, total_over_ranks
from megavar.rollout.engine import Completion, Engine, Request, SamplingParams
from megavar.rollout.metrics import RolloutMeter
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


def sample_traces(
    run: Run,
    name: str,
    *,
    weights: Phase,
    encoder: Encoder,
    questions: Sequence[Question],
    role: Role,
    count: int,
    whole: bool,
    params: SamplingParams,
    seed: int,
) -> Phase:
    """Sample `count` traces per question with the model in `weights`; `whole` goes on to the end of the answer.

    A trace without end-of-thought marker is stored as it came, `closed` false, and counted.
    """
    config = {
        "params": asdict(params),
        "template": asdict(encoder.template),
        "count": count,
        "whole": whole,
        "seed": seed,
        "questions": run.digest(questions),
        **_engine_config(run),
    }
    with run.phase(name, config=config, inputs=[weights]) as opened:
        if opened.todo:
            store, parts = trace_store(opened.phase), run.parts(questions)

            def requests(part: int) -> list[Request]:
                return [
                    Request(
                        id=q.id,
                        prompt_ids=encoder.prompt_ids(q),
                        seeds=sampling_seeds(seed, role, q.id, count),
                    )
                    for q in parts[part]
                ]

            params = stopping(params, encoder, whole=whole)
            for part, asked, completions in _by_parts(
                run, opened, store, weights, len(parts), requests, params
            ):
                prompts = {r.id: r.prompt_ids for r in asked}
                store.write_traces(
                    part, (_trace(c, prompts[c.request_id], encoder, role, params) for c in completions)
                )
            _count(opened, store, ("thought_ids", "answer_ids"))
            opened.metrics["rollout/open_rate"] = opened.counts["open"] / max(opened.counts["rows"], 1)
    return opened.phase


def sample_answers(
    run: Run, name: str, *, weights: Phase, traces: Phase, count: int, params: SamplingParams
) -> Phase:
    """`count` answers after every closed trace: y ~ pi(. | x, z, answer_start), for the accuracy estimator."""
    encoder, seed = run.policy, run.recipe.rollout.seed
    config = {
        "params": asdict(params),
        "count": count,
        "template": asdict(encoder.template),
        "seed": seed,
        **_engine_config(run),
    }
    with run.phase(name, config=config, inputs=[weights, traces]) as opened:
        if opened.todo:
            store, source = answer_store(opened.phase), trace_store(traces)
            questions = {q.id: q for q in run.train}

            def requests(part: int) -> list[Request]:
                asked = []
                for trace in source.iter_traces(parts=[part]):
                    if trace.closed:
                        key = f"{trace.question_id}/{trace.index}"
                        prompt = encoder.prompt_ids(questions[trace.question_id])
                        ids = np.concatenate([prompt, trace.thought_ids, encoder.answer_start_ids])
                        seeds = sampling_seeds(seed, "answer", key, count)
                        asked.append(Request(id=key, prompt_ids=ids, seeds=seeds))
                return asked

            params = stopping(params, encoder, whole=True)
            parts = len(source.parts_done())
            for part, _, completions in _by_parts(run, opened, store, weights, parts, requests, params):
                store.write_part(part, (_answer(c, encoder) for c in completions))
            _count(opened, store, ("ids",))
    return opened.phase


def stopping(params: SamplingParams, encoder: Encoder, *, whole: bool) -> SamplingParams:
    """Stop at the end of the answer, or of the thought: on the id where the marker is one token, else on its text."""
    ids = encoder.answer_end_ids if whole else encoder.thought_end_ids
    if len(ids) == 1:
        return replace(params, stop_ids=(int(ids[0]),))
    return replace(params, stop=(encoder.template.answer_end if whole else encoder.template.thought_end,))


def _by_parts(
    run: Run,
    opened: OpenPhase,
    store: PartStore,
    weights: Phase,
    parts: int,
    requests: Callable[[int], list[Request]],
    params: SamplingParams,
) -> Iterator[tuple[int, list[Request], list[Completion]]]:
    """This rank's missing parts, each with its requests and its completions in the requests' order.

    A part is one batch of requests by itself, so its bytes depend neither on the number of ranks nor on resumption.
    """
    done, ranks = store.parts_done(), samplers(run)
    mine = [p for p in range(parts) if p % ranks == run.groups.rank and p not in done]
    # A server fleet takes all parts as one stream, so that no tail of a part leaves it idle. Batches of the
    # in-process engine end with the part, so that its bytes depend neither on ranks nor on resumption.
    streams = [[part] for part in mine] if run.recipe.rollout.engine == "local" else [mine]
    meter = RolloutMeter()
    tokens, started = 0, time.perf_counter()
    with run.progress.phase(opened.phase.name, parts, "parts", done=len(done)) as task:
        for stream in streams:
            if not stream:
                continue
            engine = engine_with(run, weights)
            if isinstance(engine, SGLangEngine):
                engine.meter = meter  # what it tells of is this phase
            for part, asked, completions in _whole_parts(engine, stream, requests, params):
                tokens += sum(len(c.ids) for c in completions)
                yield part, asked, completions
                # Only the first rank shows progress; the others keep its pace.
                task.advance(min(ranks, parts - task.done))
        total = total_over_ranks({"tokens": tokens})["tokens"]
        task.advance(parts - task.done)
    opened.metrics["rollout/tokens_per_second"] = total / max(time.perf_counter() - started, 1e-9)
    if isinstance(run.engine, SGLangEngine):
        opened.metrics |= run.engine.metrics()


def _whole_parts(
    engine: Engine, parts: Sequence[int], requests: Callable[[int], list[Request]], params: SamplingParams
) -> Iterator[tuple[int, list[Request], list[Completion]]]:
    """Generate all parts as one stream and yield each as soon as its last completion is there.

    Holds the parts that are under way: as many as the engine keeps requests in flight.
    """
    asked: dict[int, list[Request]] = {}
    found: dict[int, list[Completion]] = {}
    part_of: dict[str, int] = {}
    empty: list[int] = []

    def stream() -> Iterator[Request]:
        for part in parts:
            wanted = requests(part)
            if not wanted:
                empty.append(part)
                continue
            asked[part], found[part] = wanted, []
            part_of.update((request.id, part) for request in wanted)
            yield from wanted

    for completion in engine.generate(stream(), params):
        part = part_of[completion.request_id]
        found[part].append(completion)
        if len(found[part]) == sum(len(request.seeds) for request in asked[part]):
            wanted, completions = asked.pop(part), found.pop(part)
            place = {request.id: n for n, request in enumerate(wanted)}
            completions.sort(key=lambda c: (place[c.request_id], c.index))
            for request in wanted:
                del part_of[request.id]
            yield part, wanted, completions
    for part in empty:
        yield part, [], []


def _count(opened: OpenPhase, store: PartStore, id_columns: tuple[str, ...]) -> None:
    """Counts of the whole store, streamed, on the rank that writes the manifest."""
    if not opened.phase.writer:
        opened.counts = {"rows": 0, "open": 0}
        return
    counts = dict.fromkeys(("rows", "truncated", "open", *id_columns), 0)
    flags = [name for name in ("closed",) if name in store.schema.names]
    for batch in store.iter_batches(["finish_reason", *flags, *id_columns]):
        counts["rows"] += batch.num_rows
        counts["truncated"] += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py() or 0
        if flags:
            counts["open"] += batch.num_rows - (pc.sum(batch["closed"]).as_py() or 0)
        for name in id_columns:
            counts[name] += pc.sum(pc.list_value_length(batch[name])).as_py() or 0
    rows = max(counts["rows"], 1)
    opened.metrics["rollout/truncation_rate"] = counts["truncated"] / rows
    opened.metrics["rollout/mean_tokens"] = sum(counts[name] for name in id_columns) / rows
    opened.counts = counts


def _engine_config(run: Run) -> dict[str, Any]:
    """What decides, beside the request, which bytes an engine samples."""
    return run.recipe.rollout.model_dump(mode="json", include={"engine", "batch_size", "questions_per_part"})


def _trace(
    completion: Completion, prompt: np.ndarray, encoder: Encoder, role: Role, params: SamplingParams
) -> Trace:
    split = encoder.split(completion.ids)
    thought = len(split.thought_ids)
    return Trace(
        question_id=completion.request_id,
        index=completion.index,
        role=role,
        prompt_ids=prompt,
        thought_ids=split.thought_ids,
        answer_ids=split.answer_ids,
        thought_logprobs=completion.logprobs[:thought],
        answer_logprobs=completion.logprobs[thought:],
        closed=split.closed,
        finish_reason=completion.finish_reason,
        temperature=params.temperature,
        top_p=params.top_p,
        seed=completion.seed,
        weight_spans=completion.weight_spans,
    )


def _answer(completion: Completion, encoder: Encoder) -> dict[str, Any]:
    question_id, _, index = completion.request_id.rpartition("/")
    return {
        "question_id": question_id,
        "index": int(index),
        "answer_index": completion.index,
        "ids": np.concatenate([encoder.answer_start_ids, completion.ids]).astype(np.int32),
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
    }
