"""Training sets of one model under two prompts: its traces after the posterior's, and after its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import torch

from megavar.config.recipe import Arm
from megavar.data.records import Question
from megavar.data.store import PartStore
from megavar.data.training_set import Example
from megavar.objectives.covrl import CompositeWeights, covrl_weights
from megavar.objectives.diagnostics import summarise
from megavar.objectives.importance import staleness, staleness_metrics
from megavar.objectives.ravr import ravr_weights
from megavar.objectives.segments import kept_offsets, offsets_of, segment_mean, segment_sum
from megavar.objectives.weights import TraceWeights, weigh
from megavar.phases.fitting import write_training_phase
from megavar.phases.own_weighing import in_segments
from megavar.phases.run import OpenPhase, Run
from megavar.phases.scoring import policy_score_store
from megavar.phases.tables import OwnSamples, Proposals, ProposalTable, own_accuracy, ragged
from megavar.phases.watch import Watch, question_store
from megavar.runs import Phase


def ravr_training_set(run: Run, name: str, arm: Arm, prompted: Proposals, own: OwnSamples) -> Phase:
    """One model under both prompts: `prompted` are its traces after the posterior's, `own` those after its own."""
    config = {
        "arm": arm.model_dump(mode="json", exclude={"name"}),
        "templates": [asdict(run.policy.template), asdict(run.posterior.template)],
        "questions": run.digest(run.train),
        "diagnostics": run.recipe.diagnostics.model_dump(mode="json"),
    }

    def build(opened: OpenPhase) -> Iterator[Example]:
        assert own.policy_scores is not None
        prior_scores = policy_score_store(own.policy_scores)
        watch, weighed, without_prior = Watch(run, hinted=True), list[TraceWeights](), 0
        for part, questions in enumerate(run.parts(run.train)):
            table = ProposalTable.read(prompted, part, questions)
            prior = _mean_log_utility(prior_scores, part, questions)
            kept = table.closed
            offsets = kept_offsets(kept, table.offsets)
            utility = table.log_c("likelihood")[kept]
            # Without a closed trace of the policy's own the traces' own mean stands in.
            missing = prior.isnan()
            without_prior += int((missing & (offsets.diff() > 0)).sum())
            prior = torch.where(missing, segment_mean(utility, offsets), prior)
            weights = ravr_weights(
                utility,
                table.log_ratio()[kept].float(),
                prior,
                offsets,
                kl=1.0 if arm.kl is None else arm.kl,
                utility_weighted=arm.utility_weighted,
            )
            weighed.append(weigh(table.scored("likelihood"), ratio="full"))
            watch.traces(questions, table.traces)
            watch.ratios(*table.ratios("posterior"))
            mass = segment_sum(weights.policy_thought, offsets)
            watch.questions(
                question_store(opened.phase),
                part,
                questions,
                accuracy=own_accuracy(own, part, questions),
                mass=mass,
                weight=mass,
            )
            by_id = {q.id: q for q in questions}
            closed = [t for t in table.traces if t.closed]
            for trace, hinted, thought, answer in zip(closed, *(w.tolist() for w in weights), strict=True):
                question = by_id[trace.question_id]
                if hinted:
                    prompt = run.posterior.prompt_ids(question)
                    routes = run.routes(trace, prompt, len(trace.thought_ids))
                    yield Example.of(question.id, prompt, trace.thought_ids, hinted, experts=routes)
                reference = run.policy.answer_ids(question.solution)
                yield in_segments(run, question, trace, reference, thought, answer, None)
        watch.report(opened, summarise(weighed) | {"questions_without_prior": float(without_prior)})

    inputs = prompted.phases + own.phases
    return write_training_phase(run, name, config=config, inputs=inputs, build=build)


def covrl_training_set(run: Run, name: str, arm: Arm, prompted: Proposals, own: OwnSamples) -> Phase:
    """Half of a question's K traces are `own`, half `prompted`, which the model drew after the posterior's prompt."""
    traces = run.recipe.rollout.traces
    config = {
        "arm": arm.model_dump(mode="json", exclude={"name"}),
        "templates": [asdict(run.policy.template), asdict(run.posterior.template)],
        "questions": run.digest(run.train),
        "diagnostics": run.recipe.diagnostics.model_dump(mode="json"),
        "traces": traces,
    }

    def build(opened: OpenPhase) -> Iterator[Example]:
        watch, weighed, behind = Watch(run, hinted=True), list[TraceWeights](), list[dict[str, float]]()
        for part, questions in enumerate(run.parts(run.train)):
            table = ProposalTable.mixed(prompted, own, part, questions, traces)
            weights, sampled, starts = _weigh(table, arm)
            behind.append(_distance(table, sampled, starts, cap=arm.importance_cap))
            weighed.append(weigh(table.scored("likelihood"), ratio="full"))
            watch.traces(questions, [t for t in table.traces if t.role == "posterior"])
            watch.ratios(*table.ratios("posterior"))
            each = segment_mean(weights.policy_thought.abs(), starts)
            watch.questions(
                question_store(opened.phase),
                part,
                questions,
                accuracy=own_accuracy(own, part, questions),
                mass=segment_sum(each, kept_offsets(table.closed, table.offsets)),
            )
            yield from _examples(run, table, weights, starts)
        watch.report(opened, summarise(weighed) | staleness_metrics(behind), signed=True)

    return write_training_phase(run, name, config=config, inputs=prompted.phases + own.phases, build=build)


def _weigh(table: ProposalTable, arm: Arm) -> tuple[CompositeWeights, torch.Tensor, torch.Tensor]:
    """Weights of the closed thoughts, the engine's log-probs of their tokens, and where each starts."""
    closed = table.closed
    sampled, starts = ragged([t.thought_logprobs for t in table.traces if t.closed])
    weights = covrl_weights(
        table.log_c("likelihood")[closed],
        table.policy,
        table.posterior,
        sampled,
        starts,
        kept_offsets(closed, table.offsets),
        torch.tensor([t.role == "policy" for t in table.traces if t.closed], dtype=torch.bool),
        kl=1.0 if arm.kl is None else arm.kl,
        clip=arm.ratio_clip,
        answer_weight=arm.answer_weight,
    )
    return weights, sampled, starts


def _distance(
    table: ProposalTable, sampled: torch.Tensor, starts: torch.Tensor, *, cap: float
) -> dict[str, float]:
    """Of the policy's own traces: how far it has moved since."""
    own = torch.tensor([t.role == "policy" for t in table.traces if t.closed], dtype=torch.bool)
    tokens = torch.repeat_interleave(own, starts.diff())
    return staleness(table.policy[tokens], sampled[tokens], offsets_of(starts.diff()[own]), cap=cap)


def _examples(
    run: Run, table: ProposalTable, weights: CompositeWeights, starts: torch.Tensor
) -> Iterator[Example]:
    """Each closed thought after both prompts, after the policy's with the reference solution behind."""
    by_id, bounds = {q.id: q for q in table.questions}, starts.tolist()
    for n, trace in enumerate(t for t in table.traces if t.closed):
        question, tokens = by_id[trace.question_id], slice(bounds[n], bounds[n + 1])
        hinted = weights.posterior_thought[tokens].float().numpy()
        if hinted.any():
            prompt = run.posterior.prompt_ids(question)
            routes = run.routes(trace, prompt, len(trace.thought_ids))
            yield Example.of(question.id, prompt, trace.thought_ids, 1.0, hinted, routes)
        answer = run.policy.answer_ids(question.solution)
        own = weights.policy_thought[tokens].float().numpy()
        each = np.concatenate([own, np.full(len(answer), float(weights.answer[n]), np.float32)])
        if each.any():
            response, prompt = np.concatenate([trace.thought_ids, answer]), run.policy.prompt_ids(question)
            routes = run.routes(trace, prompt, len(trace.thought_ids))
            yield Example.of(question.id, prompt, response, 1.0, each, routes)


def _mean_log_utility(scores: PartStore, part: int, questions: Sequence[Question]) -> torch.Tensor:
    """float [Q]: mean of log pi(y*|x,z) over the policy's own closed thoughts; NaN without one."""
    found: dict[str, list[float]] = {q.id: [] for q in questions}
    for (question_id, _), row in scores.read_keyed(["answer"], parts=[part]).items():
        found[question_id].append(float(np.sum(row["answer"], dtype=np.float64)))
    return torch.tensor([np.mean(v) if v else np.nan for v in found.values()], dtype=torch.float32)
