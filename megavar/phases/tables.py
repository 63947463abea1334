"""What is known of a part's traces, read from the phases' stores: ragged tensors in the questions' order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megavar.data.records import Question, Trace
from megavar.objectives.estimators import (
    log_accuracy,
    log_gml,
    log_hybrid,
    log_likelihood,
    log_mean_probability,
)
from megavar.objectives.mixture import mixture_logprobs
from megavar.objectives.registry import Need
from megavar.objectives.segments import kept_offsets, segment_mean, segment_sum
from megavar.objectives.weights import ScoredTraces
from megavar.phases.run import Run
from megavar.phases.sampling import answer_store, trace_store
from megavar.phases.scoring import policy_score_store, posterior_score_store, verdict_store
from megavar.runs import Phase
from megavar.verifiers import is_correct

NO_LOGPROBS = np.empty(0, np.float32)
NOT_SCORED = {"thought": NO_LOGPROBS, "answer": NO_LOGPROBS}
"""The row of a trace that was not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """Finished phases that hold a set of traces and what is known of them."""

    traces: Phase
    policy_scores: Phase
    posterior_scores: Phase
    answers: Phase | None = None
    verdicts: Phase | None = None

    @property
    def phases(self) -> list[Phase]:
        every = (self.traces, self.policy_scores, self.posterior_scores, self.answers, self.verdicts)
        return [phase for phase in every if phase is not None]

    def only(self, *, answers: bool) -> Proposals:
        """Without the answers where an arm reads none, so that other arms do not make it start again."""
        return self if answers else replace(self, answers=None, verdicts=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSamples:
    """Finished phases of the policy's own whole samples."""

    traces: Phase
    verdicts: Phase
    policy_scores: Phase | None = None
    """log pi of closed thoughts and of the reference solution behind them."""
    sample_scores: Phase | None = None
    """log pi of all that was sampled, open thoughts too."""
    initial_scores: Phase | None = None
    """log pi_0 of closed thoughts; None where the policy is pi_0."""
    posterior_scores: Phase | None = None
    """log q of closed thoughts."""
    prompted_scores: Phase | None = None
    """log pi of closed thoughts after the posterior's prompt."""

    @property
    def phases(self) -> list[Phase]:
        every = (
            self.traces,
            self.verdicts,
            self.policy_scores,
            self.sample_scores,
            self.initial_scores,
            self.posterior_scores,
            self.prompted_scores,
        )
        return [phase for phase in every if phase is not None]

    def only(self, needs: Collection[Need]) -> OwnSamples:
        """Without what an arm of these needs does not read, so that other arms do not make it start again."""
        return OwnSamples(
            traces=self.traces,
            verdicts=self.verdicts,
            policy_scores=self.policy_scores if "own_reference" in needs else None,
            sample_scores=self.sample_scores if "own_samples" in needs else None,
            initial_scores=self.initial_scores if "own_initial" in needs else None,
            posterior_scores=self.posterior_scores if "own_posterior" in needs else None,
            prompted_scores=self.prompted_scores if "own_prompted" in needs else None,
        )


@dataclass(slots=True, kw_only=True)
class ProposalTable:
    """One part's traces from the posterior, or from policy and posterior together."""

    questions: Sequence[Question]
    traces: list[Trace]
    offsets: torch.Tensor
    """int64 [Q+1] over traces."""
    thought_offsets: torch.Tensor
    policy: torch.Tensor
    posterior: torch.Tensor
    """log q of the thoughts' tokens."""
    proposal: torch.Tensor
    """log-density of the tokens under what the traces came from: q, or the mixture."""
    reference_offsets: torch.Tensor
    reference: torch.Tensor
    answer_scores: torch.Tensor
    answer_offsets: torch.Tensor
    answer_ids: list[np.ndarray]
    """Of sampled answers; empty without the accuracy estimator."""

    @classmethod
    def read(cls, proposals: Proposals, part: int, questions: Sequence[Question]) -> ProposalTable:
        traces = list(trace_store(proposals.traces).iter_traces(parts=[part]))
        rows = _scored(traces, proposals.policy_scores, proposals.posterior_scores, part)
        if proposals.answers is None or proposals.verdicts is None:
            scores, answer_offsets = torch.zeros(0), torch.zeros(len(traces) + 1, dtype=torch.int64)
            answer_ids: list[np.ndarray] = []
        else:
            scores, answer_offsets, answer_ids = read_answers(
                traces, proposals.answers, proposals.verdicts, part
            )
        table = cls._of(questions, traces, rows)
        table.answer_scores, table.answer_offsets, table.answer_ids = scores, answer_offsets, answer_ids
        return table

    @classmethod
    def mixed(
        cls, proposals: Proposals, own: OwnSamples, part: int, questions: Sequence[Question], count: int
    ) -> ProposalTable:
        """Half of each question's `count` traces from the policy, half from the posterior, as one proposal. The
        posterior may be the policy itself under the posterior's prompt."""
        hinted = own.posterior_scores or own.prompted_scores
        assert own.policy_scores is not None and hinted is not None
        taken: dict[str, list[tuple[Trace, _Row]]] = {q.id: [] for q in questions}
        sides = (
            (own.traces, own.policy_scores, hinted, count // 2),
            (proposals.traces, proposals.policy_scores, proposals.posterior_scores, count - count // 2),
        )
        for store, policy_scores, posterior_scores, size in sides:
            found = [t for t in trace_store(store).iter_traces(parts=[part]) if t.index < size]
            for trace, row in zip(found, _scored(found, policy_scores, posterior_scores, part), strict=True):
                taken[trace.question_id].append((trace, row))
        both = [pair for pairs in taken.values() for pair in pairs]
        table = cls._of(questions, [trace for trace, _ in both], [row for _, row in both])
        share = (count // 2) / count
        table.proposal = mixture_logprobs(table.policy, table.posterior, table.thought_offsets, share=share)
        return table

    @classmethod
    def _of(cls, questions: Sequence[Question], traces: list[Trace], rows: list[_Row]) -> ProposalTable:
        thought, thought_offsets = ragged([row.policy for row in rows])
        reference, reference_offsets = ragged([row.reference for row in rows])
        posterior, _ = ragged([row.posterior for row in rows])
        return cls(
            questions=questions,
            traces=traces,
            offsets=trace_offsets(traces, questions),
            thought_offsets=thought_offsets,
            policy=thought,
            posterior=posterior,
            proposal=posterior,
            reference_offsets=reference_offsets,
            reference=reference,
            answer_scores=torch.zeros(0),
            answer_offsets=torch.zeros(len(traces) + 1, dtype=torch.int64),
            answer_ids=[],
        )

    @property
    def closed(self) -> torch.Tensor:
        """bool [N]"""
        return torch.tensor([t.closed for t in self.traces], dtype=torch.bool)

    def log_ratio(self) -> torch.Tensor:
        """float [N]: log q(z) - log pi(z) of the whole thoughts; NaN where a thought is open."""
        total = segment_sum(self.posterior.double() - self.policy.double(), self.thought_offsets)
        return total.masked_fill(~self.closed, torch.nan)

    def ratios(self, role: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`log_ratio`, thought lengths [N'] and question offsets [Q+1] of the traces by one author."""
        kept = torch.tensor([t.role == role for t in self.traces], dtype=torch.bool)
        return (
            self.log_ratio()[kept],
            self.thought_offsets.diff()[kept],
            kept_offsets(kept, self.offsets),
        )

    def scored(self, estimator: str) -> ScoredTraces:
        return ScoredTraces(
            question_ids=tuple(q.id for q in self.questions),
            question_offsets=self.offsets,
            log_c=self.log_c(estimator),
            eligible=self.closed,
            policy_logprobs=self.policy,
            posterior_logprobs=self.proposal,
            cu_seqlens=self.thought_offsets,
        )

    def log_c(self, estimator: str) -> torch.Tensor:
        """float [N]; what stands for an open thought is nobody's promise."""
        if estimator == "accuracy":
            return log_accuracy(self.answer_scores, self.answer_offsets)
        if estimator == "hybrid":
            return log_hybrid(self.answer_scores, self.answer_offsets, self.log_gml())
        if estimator == "likelihood":
            return log_likelihood(self.reference, self.reference_offsets)
        if estimator == "mean_probability":
            return log_mean_probability(self.reference, self.reference_offsets)
        return self.log_gml()

    def answer_accuracy(self) -> torch.Tensor:
        """float [Q]: share of right answers among all that were sampled after a question's traces; NaN without."""
        return segment_mean(self.answer_scores, self.answer_offsets[self.offsets])

    def mean_c(self, estimator: str) -> torch.Tensor:
        """float [Q]: mean of c over a question's closed thoughts; NaN without."""
        closed = self.closed
        return segment_mean(self.log_c(estimator)[closed].exp(), kept_offsets(closed, self.offsets))

    def log_gml(self) -> torch.Tensor:
        return log_gml(self.reference, self.reference_offsets)


@dataclass(slots=True, kw_only=True)
class _Row:
    """One trace's log-probs, float32 [n]; empty where it is open, since open traces are not scored."""

    policy: np.ndarray
    posterior: np.ndarray
    reference: np.ndarray


def _scored(traces: list[Trace], policy_scores: Phase, posterior_scores: Phase, part: int) -> list[_Row]:
    policy = policy_score_store(policy_scores).read_keyed(["thought", "answer"], parts=[part])
    posterior = posterior_score_store(posterior_scores).read_keyed(["thought"], parts=[part])
    keys = [(t.question_id, t.index) for t in traces]
    return [
        _Row(
            policy=policy.get(key, NOT_SCORED)["thought"],
            reference=policy.get(key, NOT_SCORED)["answer"],
            posterior=posterior.get(key, NOT_SCORED)["thought"],
        )
        for key in keys
    ]


def read_answers(
    traces: Sequence[Trace], answers: Phase, verdicts: Phase, part: int
) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Correctness (0 or 1) of each trace's sampled answers, where they start, and their ids, in trace order."""
    scores = verdict_store(verdicts).read_keyed(["score"], parts=[part])
    ids = answer_store(answers).read_keyed(["ids"], parts=[part])
    by_trace: dict[tuple[str, int], list[int]] = {}
    for question_id, index, answer in sorted(scores):
        by_trace.setdefault((question_id, index), []).append(answer)
    correct: list[float] = []
    found: list[np.ndarray] = []
    offsets = [0]
    for trace in traces:
        key = (trace.question_id, trace.index)
        for answer in by_trace.get(key, []):
            correct.append(float(is_correct(scores[(*key, answer)]["score"])))
            found.append(ids[(*key, answer)]["ids"])
        offsets.append(len(correct))
    return torch.tensor(correct, dtype=torch.float32), torch.tensor(offsets), found


def read_correct(traces: Sequence[Trace], verdicts: Phase, part: int) -> torch.Tensor:
    """bool [N]: each whole sample's own answer is right."""
    scores = verdict_store(verdicts).read_keyed(["score"], parts=[part])
    right = [t.closed and is_correct(scores[(t.question_id, t.index, 0)]["score"]) for t in traces]
    return torch.tensor(right, dtype=torch.bool)


def own_accuracy(own: OwnSamples, part: int, questions: Sequence[Question]) -> torch.Tensor:
    """float [Q]: share of the policy's own samples that are right; NaN where it has none."""
    traces = list(trace_store(own.traces).iter_traces(parts=[part]))
    return segment_mean(read_correct(traces, own.verdicts, part).float(), trace_offsets(traces, questions))


def trace_offsets(traces: Sequence[Trace], questions: Sequence[Question]) -> torch.Tensor:
    """int64 [Q+1]: where each question's traces start; traces lie in the questions' order."""
    counts = dict.fromkeys((q.id for q in questions), 0)
    for trace in traces:
        counts[trace.question_id] += 1
    return torch.tensor([0, *counts.values()], dtype=torch.int64).cumsum(0)


def ragged(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of float32 end to end, [T], and where each starts, int64 [N+1]."""
    offsets = torch.tensor([0, *map(len, rows)], dtype=torch.int64).cumsum(0)
    return torch.from_numpy(np.concatenate([NO_LOGPROBS, *rows])), offsets


def well_formed(run: Run, trace: Trace) -> bool:
    """Thought and answer both ended with their markers."""
    return trace.closed and run.policy.answer_text(trace.answer_ids).ended


def mean_length(traces: Phase) -> float:
    """Sampled tokens of a trace, over the whole store; streamed."""
    tokens = count = 0
    for batch in trace_store(traces).iter_batches(["thought_ids", "answer_ids"]):
        for column in ("thought_ids", "answer_ids"):
            tokens += len(batch[column].flatten())
        count += batch.num_rows
    return tokens / max(count, 1)
