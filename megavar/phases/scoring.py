"""Log-probs of sampled thoughts and reference answers, and the verifier's word on sampled answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from megavar.data.records import Question, Trace
from megavar.data.store import PartStore
from megavar.data.templates import Encoder
from megavar.data.traces import LOGPROBS, TraceStore
from megavar.data.training_set import Example
from megavar.phases.run import OpenPhase, Run, largest_over_ranks, total_over_ranks
from megavar.phases.sampling import answer_store, trace_store
from megavar.runs import Phase
from megavar.trainer.score import score
from megavar.verifiers import is_correct, verify_all
from megavar.verifiers.sandbox import isolation

_KEY = [pa.field("question_id", pa.string(), nullable=False), pa.field("index", pa.int32(), nullable=False)]
POLICY_SCORES = pa.schema(
    [*_KEY, pa.field("thought", LOGPROBS, nullable=False), pa.field("answer", LOGPROBS, nullable=False)]
)
"""log pi(z_t) [Z], and log pi(y*_t | x, z) [A] of the reference solution with its markers."""
POSTERIOR_SCORES = pa.schema([*_KEY, pa.field("thought", LOGPROBS, nullable=False)])
"""log q(z_t) [Z] of the same ids."""
VERDICTS = pa.schema(
    [
        *_KEY,
        pa.field("answer_index", pa.int32(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
    ]
)
"""Verifier scores in [0, 1]; `answer_index` is 0 for a trace's own answer. `outcome` is "verified", "timed_out" or
why there is no verdict; the latter two score 0."""


def policy_score_store(phase: Phase) -> PartStore:
    return PartStore(phase.path / "scores", POLICY_SCORES)


def posterior_score_store(phase: Phase) -> PartStore:
    return PartStore(phase.path / "scores", POSTERIOR_SCORES)


def verdict_store(phase: Phase) -> PartStore:
    return PartStore(phase.path / "verdicts", VERDICTS, key=("question_id", "index", "answer_index"))


def score_under_policy(run: Run, name: str, *, weights: Phase, traces: Phase) -> Phase:
    """log pi of each closed thought and of the reference solution behind it, in one pass over both."""

    def example(trace: Trace, question: Question) -> Example:
        answer = run.policy.answer_ids(question.solution)
        response, prompt = np.concatenate([trace.thought_ids, answer]), run.policy.prompt_ids(question)
        routes = trace.routes(prompt, len(trace.thought_ids))
        return Example.of(question.id, prompt, response, experts=routes)

    return _score(run, name, run.policy, weights, traces, policy_score_store, example, proposal=False)


def score_samples(run: Run, name: str, *, weights: Phase, traces: Phase) -> Phase:
    """log pi of all that was sampled, thought and own answer, of open traces too: the other side of the engine's own
    log-probs, for importance ratios."""

    def example(trace: Trace, question: Question) -> Example:
        response = np.concatenate([trace.thought_ids, trace.answer_ids])
        return Example.of(question.id, trace.prompt_ids, response, experts=trace.experts)

    return _score(
        run, name, run.policy, weights, traces, policy_score_store, example, proposal=False, open_too=True
    )


def score_under_posterior(
    run: Run, name: str, *, weights: Phase, traces: Phase, proposed: bool = True
) -> Phase:
    """log q of each closed thought, at the temperature it was sampled at.

    proposed: q itself sampled the traces; then its gap to the engine's own log-probs is a metric.
    """

    def example(trace: Trace, question: Question) -> Example:
        prompt = run.posterior.prompt_ids(question)
        routes = trace.routes(prompt, len(trace.thought_ids))
        return Example.of(question.id, prompt, trace.thought_ids, experts=routes)

    return _score(
        run, name, run.posterior, weights, traces, posterior_score_store, example, proposal=proposed
    )


def _score(
    run: Run,
    name: str,
    encoder: Encoder,
    weights: Phase,
    traces: Phase,
    store_of: Callable[[Phase], PartStore],
    example: Callable[[Trace, Question], Example],
    *,
    proposal: bool,
    open_too: bool = False,
) -> Phase:
    """Score the closed traces part by part, parts spread over data-parallel ranks.

    encoder: whose prompt the examples have. proposal: the model is the one that sampled the traces, so its log-probs
    must equal the engine's. open_too: score open traces as well.
    """
    temperature = run.recipe.rollout.temperature
    config = {
        "temperature": temperature,
        "dtype": run.settings.dtype,
        "template": asdict(encoder.template),
        **({"megatron": run.settings.switches} if run.settings.switches else {}),
    }
    with run.phase(name, config=config, inputs=[weights, traces]) as opened:
        if opened.todo:
            groups, store, source = run.groups, store_of(opened.phase), trace_store(traces)
            questions = {q.id: q for q in run.train}
            parts, done = sorted(source.parts_done()), store.parts_done()
            mine = [p for p in parts if p % groups.dp == groups.dp_rank and p not in done]
            tokens, started, counted = 0, time.perf_counter(), Counter[str]()
            turns = int(largest_over_ranks(len(mine)))
            model = run.model(weights) if turns else None
            with run.progress.phase(name, len(parts), "parts", done=len(done)) as task:
                # As many turns on every rank, for what must be done together.
                for part in [*mine, *[None] * (turns - len(mine))]:
                    found = [] if part is None else source.iter_traces(parts=[part])
                    wanted = [t for t in found if t.closed or open_too]
                    examples = [example(t, questions[t.question_id]) for t in wanted]
                    assert model is not None
                    logprobs = score(
                        model,
                        examples,
                        temperature=temperature,
                        tokens_per_micro_batch=run.recipe.trainer.scoring_budget,
                        counted=counted if run.recipe.rollout.replay_experts else None,
                    )
                    # One rank of each data-parallel part writes.
                    if part is not None and logprobs is not None and groups.answers:
                        scored = zip(wanted, logprobs, strict=True)
                        store.write_part(part, (_row(*pair, store.schema.names) for pair in scored))
                        tokens += sum(len(e.ids) for e in examples)
                    task.advance(min(groups.dp, len(parts) - task.done))
                total = total_over_ranks({"tokens": tokens})["tokens"]
                task.advance(len(parts) - task.done)
            opened.metrics["perf/scored_tokens_per_second"] = total / (time.perf_counter() - started)
            if run.recipe.rollout.replay_experts and turns:
                sums = total_over_ranks({name: counted[name] for name in ("scored", "replayed")})
                opened.metrics["rollout/replayed_share"] = sums["replayed"] / max(sums["scored"], 1)
            # All parts, those of an earlier, killed process too.
            shared = [p for p in parts if p % groups.world == groups.rank]
            if proposal:
                _compare(opened, store, source, shared)
            rows_of = {"traces": sum(b.num_rows for b in store.iter_batches(["index"], parts=shared))}
            opened.counts = {k: int(v) for k, v in total_over_ranks(rows_of).items()}
    return opened.phase


def _row(trace: Trace, logprobs: np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
    z = len(trace.thought_ids)
    row = {"question_id": trace.question_id, "index": trace.index, "thought": logprobs[:z]}
    return row | {"answer": logprobs[z:]} if "answer" in columns else row


def _compare(opened: OpenPhase, store: PartStore, source: TraceStore, parts: Sequence[int]) -> None:
    """How far the trainer's log-probs of the thoughts lie from the engine's, over all ranks' parts."""
    sums, worst = {"gap": 0.0, "tokens": 0.0}, 0.0
    for part in parts:
        scored = store.read_keyed(["thought"], parts=[part])
        for trace in source.iter_traces(parts=[part]):
            if trace.closed:
                gaps = np.abs(scored[trace.question_id, trace.index]["thought"] - trace.thought_logprobs)
                sums["gap"] += float(gaps.sum())
                sums["tokens"] += gaps.size
                worst = max(worst, float(gaps.max(initial=0)))
    totals = total_over_ranks(sums)
    opened.metrics["rollout/logprob_gap_mean"] = totals["gap"] / max(totals["tokens"], 1)
    opened.metrics["rollout/logprob_gap_max"] = largest_over_ranks(worst)


def verify_answers(run: Run, name: str, *, answers: Phase) -> Phase:
    """The verifier's score of each sampled answer, keyed by (question, trace, answer)."""
    source = answer_store(answers)

    def texts(part: int) -> Iterable[tuple[tuple[str, int, int], np.ndarray]]:
        for batch in source.iter_batches(["question_id", "index", "answer_index", "ids"], parts=[part]):
            for row in batch.to_pylist():
                yield (row["question_id"], row["index"], row["answer_index"]), np.array(row["ids"], np.int32)

    return _verify(run, name, answers, source, texts, run.train)


def verify_traces(run: Run, name: str, *, traces: Phase, questions: list[Question]) -> Phase:
    """The verifier's score of each whole trace's own answer; 0 for an open trace."""
    source = trace_store(traces)

    def texts(part: int) -> Iterable[tuple[tuple[str, int, int], np.ndarray]]:
        for trace in source.iter_traces(parts=[part]):
            yield (trace.question_id, trace.index, 0), trace.answer_ids

    return _verify(run, name, traces, source, texts, questions)


def _verify(
    run: Run,
    name: str,
    answers: Phase,
    source: PartStore,
    texts: Callable[[int], Iterable[tuple[tuple[str, int, int], np.ndarray]]],
    questions: list[Question],
) -> Phase:
    config = {"questions": run.digest(questions), "template": asdict(run.policy.template)}
    with run.phase(name, config=config, inputs=[answers]) as opened:
        if opened.todo:
            groups, by_id = run.groups, {q.id: q for q in questions}
            store = verdict_store(opened.phase)
            parts, done = sorted(source.parts_done()), store.parts_done()
            with run.progress.phase(name, len(parts), "parts", done=len(done)) as task:
                for part in parts:
                    if part % groups.world != groups.rank or part in done:
                        continue
                    items = [
                        (key, run.policy.answer_text(ids).text, by_id[key[0]]) for key, ids in texts(part)
                    ]
                    verdicts = verify_all(items, pool=run.verifiers)
                    store.write_part(
                        part,
                        (
                            {
                                "question_id": key[0],
                                "index": key[1],
                                "answer_index": key[2],
                                "score": verdicts.scores[key],
                                "outcome": verdicts.outcomes[key],
                            }
                            for key, _, _ in items
                        ),
                    )
                    task.advance(min(groups.world, len(parts) - task.done))
                dist.barrier()
                task.advance(len(parts) - task.done)
            if opened.phase.writer:
                # Of training questions, the verdicts are on samples to learn from.
                group = "eval" if questions is run.held_out else "rollout"
                _count_verdicts(opened, store, group)
                if any(question.verifier == "code" for question in questions):
                    opened.metrics[f"{group}/code_namespaces"] = float(not isolation().weakness)
    return opened.phase


def _count_verdicts(opened: OpenPhase, store: PartStore, group: str) -> None:
    """Counts of the whole store, streamed."""
    counts = dict.fromkeys(("answers", "correct", "failed", "timed_out"), 0)
    for batch in store.iter_batches(["score", "outcome"]):
        outcomes = batch["outcome"].to_pylist()
        verified, late = outcomes.count("verified"), outcomes.count("timed_out")
        counts["answers"] += len(outcomes)
        counts["correct"] += sum(map(is_correct, batch["score"].to_pylist()))
        counts["timed_out"] += late
        counts["failed"] += len(outcomes) - verified - late
    opened.counts = counts
    opened.metrics[f"{group}/correct"] = counts["correct"] / max(counts["answers"], 1)
