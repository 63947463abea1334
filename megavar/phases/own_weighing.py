"""Training sets from the policy's own samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import torch

from megavar.config.recipe import Arm
from megavar.data.records import Question, Trace
from megavar.data.store import PartStore
from megavar.data.training_set import Example
from megavar.objectives.bias import implied_question_weight
from megavar.objectives.diagnostics import summarise
from megavar.objectives.importance import clipped_factors, staleness, staleness_metrics, truncated_factors
from megavar.objectives.policy_gradient import SegmentWeights
from megavar.objectives.registry import OBJECTIVES, Samples, weigh_samples
from megavar.objectives.segments import segment_mean, segment_sum
from megavar.objectives.weights import ScoredTraces, TraceWeights, weigh
from megavar.phases.fitting import write_training_phase
from megavar.phases.run import OpenPhase, Run
from megavar.phases.sampling import trace_store
from megavar.phases.scoring import policy_score_store
from megavar.phases.tables import (
    NO_LOGPROBS,
    NOT_SCORED,
    OwnSamples,
    mean_length,
    ragged,
    read_correct,
    trace_offsets,
    well_formed,
)
from megavar.phases.watch import Watch, question_store
from megavar.runs import Phase

SEGMENT_WEIGHTS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("thought", pa.float32(), nullable=False),
        pa.field("answer", pa.float32(), nullable=False),
    ]
)
"""Per sample: its verdict, and the weights of thought and answer before importance factors."""


def own_training_set(run: Run, name: str, arm: Arm, own: OwnSamples) -> Phase:
    """Signed weights on the policy's own thoughts, followed by their own answers or by the reference solution."""
    config = {
        "arm": arm.model_dump(mode="json", exclude={"name"}),
        "template": asdict(run.policy.template),
        "questions": run.digest(run.train),
    }

    def build(opened: OpenPhase) -> Iterator[Example]:
        length = mean_length(own.traces)
        store = PartStore(opened.path / "weights", SEGMENT_WEIGHTS)
        behind, weighed = list[dict[str, float]](), list[TraceWeights]()
        correct = 0.0
        watch = Watch(run, hinted=False)
        for part, questions in enumerate(run.parts(run.train)):
            table = _OwnTable.read(run, arm, own, part, questions, length)
            samples = table.samples
            weights = weigh_samples(samples, arm)
            accuracy = segment_mean(samples.correct.float(), samples.question_offsets)
            correct += float(accuracy.nansum())
            watch.traces(questions, table.traces)
            watch.questions(
                question_store(opened.phase),
                part,
                questions,
                accuracy=accuracy,
                mass=segment_sum(weights.thought.abs(), samples.question_offsets),
                weight=implied_question_weight(weights.thought, samples.correct, samples.question_offsets),
            )
            store.write_part(part, table.rows(weights))
            weighed.append(weigh(table.scored(arm), ratio="none" if table.now is None else "full"))
            if table.now is not None:
                behind.append(staleness(table.now, table.then, table.token_offsets, cap=arm.importance_cap))
            yield from table.examples(run, arm, weights)
        metrics = {"sample_accuracy": correct / len(run.train)} | staleness_metrics(behind)
        watch.report(opened, summarise(weighed) | metrics, signed=arm.objective != "rft")

    return write_training_phase(run, name, config=config, inputs=own.phases, build=build)


@dataclass(slots=True, kw_only=True)
class _OwnTable:
    """One part's own samples."""

    questions: Sequence[Question]
    traces: list[Trace]
    samples: Samples
    then: torch.Tensor
    """float [T]: the engine's log-probs of the tokens that `now` scores."""
    token_offsets: torch.Tensor
    """int64 [N+1]"""
    now: torch.Tensor | None
    """float [T]: the policy's, where they were asked for."""

    @classmethod
    def read(
        cls, run: Run, arm: Arm, own: OwnSamples, part: int, questions: Sequence[Question], length: float
    ) -> _OwnTable:
        thoughts_alone = OBJECTIVES[arm.objective].kind == "reference"
        traces = list(trace_store(own.traces).iter_traces(parts=[part]))
        keys = [(t.question_id, t.index) for t in traces]
        reference = reference_offsets = now = log_ratio = None
        then, token_offsets = ragged([NO_LOGPROBS for _ in traces])
        if own.policy_scores is not None:
            rows = policy_score_store(own.policy_scores).read_keyed(["thought", "answer"], parts=[part])
            found = [rows.get(k, NOT_SCORED) for k in keys]
            reference, reference_offsets = ragged([row["answer"] for row in found])
            now, token_offsets = ragged([row["thought"] for row in found])
            then, _ = ragged(
                [t.thought_logprobs if k in rows else NO_LOGPROBS for t, k in zip(traces, keys, strict=True)]
            )
            if own.initial_scores is not None:
                rows = policy_score_store(own.initial_scores).read_keyed(["thought"], parts=[part])
                first, _ = ragged([rows.get(k, NOT_SCORED)["thought"] for k in keys])
                log_ratio = segment_sum(now - first, token_offsets)
        if (
            own.sample_scores is not None
        ):  # of open thoughts too, and of own answers where they are trained on
            rows = policy_score_store(own.sample_scores).read_keyed(["thought", "answer"], parts=[part])
            sides = ["thought"] if thoughts_alone else ["thought", "answer"]
            now, token_offsets = ragged([np.concatenate([rows[k][side] for side in sides]) for k in keys])
            drawn = [(t.thought_logprobs, t.answer_logprobs)[: len(sides)] for t in traces]
            then, _ = ragged([np.concatenate(logprobs) for logprobs in drawn])
        samples = Samples(
            question_offsets=trace_offsets(traces, questions),
            correct=read_correct(traces, own.verdicts, part),
            well_formed=torch.tensor([well_formed(run, t) for t in traces], dtype=torch.bool),
            lengths=torch.tensor([len(t.thought_ids) + len(t.answer_ids) for t in traces]),
            mean_length=length,
            reference_logprobs=reference,
            reference_offsets=reference_offsets,
            log_ratio=log_ratio,
        )
        return cls(
            questions=questions,
            traces=traces,
            samples=samples,
            then=then,
            token_offsets=token_offsets,
            now=now,
        )

    def scored(self, arm: Arm) -> ScoredTraces:
        """rho is c as the arm knows it, the verdict or its probability of the reference solution; where it is known,
        times the ratio of the policy to what sampled."""
        samples = self.samples
        if OBJECTIVES[arm.objective].kind == "reference":
            log_c = samples.log_likelihood()
        else:
            log_c = samples.rewards(arm.reward).log()
        return ScoredTraces(
            question_ids=tuple(q.id for q in self.questions),
            question_offsets=samples.question_offsets,
            log_c=log_c,
            eligible=torch.ones_like(samples.correct) if self.now is None else self.token_offsets.diff() > 0,
            policy_logprobs=self.now,
            posterior_logprobs=self.then,
            cu_seqlens=self.token_offsets,
        )

    def rows(self, weights: SegmentWeights) -> Iterator[dict]:
        columns = (self.samples.correct.tolist(), weights.thought.tolist(), weights.answer.tolist())
        for trace, correct, thought, answer in zip(self.traces, *columns, strict=True):
            yield {
                "question_id": trace.question_id,
                "index": trace.index,
                "correct": correct,
                "thought": thought,
                "answer": answer,
            }

    def examples(self, run: Run, arm: Arm, weights: SegmentWeights) -> Iterator[Example]:
        """Samples with weight, in the questions' order; an importance factor of zero everywhere leaves one out."""
        factors = self._factors(arm, weights)
        reference = OBJECTIVES[arm.objective].kind == "reference"
        by_id = {q.id: q for q in self.questions}
        for n, trace in enumerate(self.traces):
            thought, answer = float(weights.thought[n]), float(weights.answer[n])
            if thought == 0 and answer == 0:
                continue
            question = by_id[trace.question_id]
            follow = trace.answer_ids
            if reference:
                # After an open thought there is no answer.
                follow = run.policy.answer_ids(question.solution) if trace.closed else trace.answer_ids[:0]
            factor = None if factors is None else factors[n]
            if reference and factor is not None and arm.importance == "sequence":
                # What the thought's own ratio is goes for the solution behind it.
                factor = np.concatenate([factor, factor[:1].repeat(len(follow))])
            example = in_segments(run, question, trace, follow, thought, answer, factor)
            if example.token_weights is None or example.token_weights.any():
                yield example

    def _factors(self, arm: Arm, weights: SegmentWeights) -> list[np.ndarray] | None:
        """Per sample, a factor for each sampled token that was scored."""
        if arm.importance == "none":
            return None
        assert self.now is not None
        if arm.importance == "clipped":
            found = clipped_factors(
                self.now, self.then, self.token_offsets, weights.thought, low=arm.clip_low, high=arm.clip_high
            )
        else:
            found = truncated_factors(
                self.now,
                self.then,
                self.token_offsets,
                cap=arm.importance_cap,
                whole_sequence=arm.importance == "sequence",
            )
        return [part.numpy() for part in found.split(self.token_offsets.diff().tolist())]


def in_segments(
    run: Run,
    question: Question,
    trace: Trace,
    answer_ids: np.ndarray,
    thought: float,
    answer: float,
    factors: np.ndarray | None,
) -> Example:
    """Thought and what follows it under the policy's prompt; `factors` are of the sampled tokens, from the first on."""
    prompt = run.policy.prompt_ids(question)
    response = np.concatenate([trace.thought_ids, answer_ids])
    sampled = len(response) if answer_ids is trace.answer_ids else len(trace.thought_ids)
    routes = run.routes(trace, prompt, sampled)
    if factors is None and thought == answer:
        return Example.of(question.id, prompt, response, thought, experts=routes)
    each = np.concatenate(
        [np.full(len(trace.thought_ids), thought), np.full(len(answer_ids), answer)]
    ).astype(np.float32)
    if factors is not None:
        each[: len(factors)] *= factors
    return Example.of(question.id, prompt, response, 1.0, each, routes)
