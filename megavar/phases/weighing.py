"""From scored traces to training sets: the objectives applied, question by question, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from megavar.config.recipe import Arm
from megavar.data.records import Trace
from megavar.data.store import PartStore
from megavar.data.training_set import Example
from megavar.objectives.diagnostics import summarise
from megavar.objectives.elbo import elbo_weights
from megavar.objectives.estimators import log_accuracy, share_over_answers
from megavar.objectives.forward_kl import forward_kl_weights
from megavar.objectives.importance import staleness, staleness_metrics
from megavar.objectives.segments import kept_offsets
from megavar.objectives.weights import TraceWeights, weigh
from megavar.phases.fitting import dataset_example, write_training_phase
from megavar.phases.run import OpenPhase, Run
from megavar.phases.sampling import trace_store
from megavar.phases.scoring import policy_score_store
from megavar.phases.tables import (
    NO_LOGPROBS,
    OwnSamples,
    Proposals,
    ProposalTable,
    own_accuracy,
    ragged,
    read_answers,
    trace_offsets,
)
from megavar.phases.watch import Watch, question_store
from megavar.runs import Phase

WEIGHTS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("normalised", pa.float32(), nullable=False),
        pa.field("log_ratio", pa.float32(), nullable=False),
        pa.field("log_rho", pa.float32(), nullable=False),
        pa.field("bound", pa.float32(), nullable=False),
    ]
)
"""Per trace: who proposed it, the example weight, rho~ before selection, s, log rho, and L_k of the question's first k
traces."""


def weight_store(phase: Phase) -> PartStore:
    return PartStore(phase.path / "weights", WEIGHTS, key=("question_id", "role", "index"))


def variational_training_set(
    run: Run, name: str, arm: Arm, proposals: Proposals, own: OwnSamples | None = None
) -> Phase:
    """Self-normalised weights on the posterior's traces (Eq. 6 and 8), selected and mixed as the arm says.

    own: the policy's own samples, half of the traces for `mixture`.
    """
    seed = run.recipe.trainer.seed
    config = {
        "arm": arm.model_dump(mode="json", exclude={"name"}),
        "seed": seed,
        "template": asdict(run.policy.template),
        "questions": run.digest(run.train),
        "diagnostics": run.recipe.diagnostics.model_dump(mode="json"),
        **({"traces": run.recipe.rollout.traces} if own else {}),
    }

    def build(opened: OpenPhase) -> Iterator[Example]:
        store, weighed, watch = weight_store(opened.phase), list[TraceWeights](), Watch(run, hinted=True)
        for part, questions in enumerate(run.parts(run.train)):
            if own:
                table = ProposalTable.mixed(proposals, own, part, questions, run.recipe.rollout.traces)
                accuracy = own_accuracy(own, part, questions)
            else:
                table = ProposalTable.read(proposals, part, questions)
                accuracy = table.answer_accuracy()
                if proposals.answers is None:
                    accuracy = table.mean_c("likelihood" if arm.objective == "elbo" else arm.estimator)
            weights = _weigh(table, arm, seed)
            store.write_part(part, _rows(table.traces, weights))
            weighed.append(weights)
            mass = weights.question_weight
            watch.traces(questions, [t for t in table.traces if t.role == "posterior"])
            watch.ratios(*table.ratios("posterior"))
            watch.questions(
                question_store(opened.phase),
                part,
                questions,
                accuracy=accuracy,
                mass=mass,
                weight=mass,
            )
            yield from _examples(run, arm, table, weights)
        watch.report(opened, summarise(weighed))

    inputs = proposals.phases + (own.phases if own else [])
    return write_training_phase(run, name, config=config, inputs=inputs, build=build)


def _weigh(table: ProposalTable, arm: Arm, seed: int) -> TraceWeights:
    if arm.objective != "elbo":
        return weigh(
            table.scored(arm.estimator),
            ratio=arm.ratio,
            temper=arm.temper,
            clip=arm.clip,
            selection=arm.selection,
            all_zero=arm.all_zero,
            gml=table.log_gml(),
            seed=seed,
        )
    # The full ratio and the likelihood, so that L_1 is the bound which the even weights climb.
    weighed = weigh(table.scored("likelihood"), ratio="full")
    closed = table.closed
    offsets = kept_offsets(closed, table.offsets)
    weights = torch.zeros_like(weighed.weights).masked_scatter(closed, elbo_weights(offsets))
    return replace(weighed, weights=weights, question_weight=(offsets.diff() > 0).to(weights.dtype))


def forward_kl_training_set(
    run: Run,
    name: str,
    *,
    traces: Phase,
    answers: Phase,
    verdicts: Phase,
    policy_scores: Phase | None = None,
) -> Phase:
    """The policy's own thoughts under the posterior's prompt, weighted by self-normalised accuracy (Eq. 9).

    policy_scores: of the traces under the newest policy, where they come from an older one.
    """
    config = {"template": asdict(run.posterior.template), "questions": run.digest(run.train)}

    def build(opened: OpenPhase) -> Iterator[Example]:
        weighed, watch = list[TraceWeights](), Watch(run, hinted=False)
        behind = list[dict[str, float]]()
        for part, questions in enumerate(run.parts(run.train)):
            found = list(trace_store(traces).iter_traces(parts=[part]))
            scores, answer_offsets, _ = read_answers(found, answers, verdicts, part)
            since = _since_sampled(found, policy_scores, part)
            if since:
                now, then = since["policy_logprobs"], since["sampled_logprobs"]
                behind.append(staleness(now, then, since["cu_seqlens"]))
            weights = forward_kl_weights(
                tuple(q.id for q in questions),
                trace_offsets(found, questions),
                log_accuracy(scores, answer_offsets),
                eligible=torch.tensor([t.closed for t in found], dtype=torch.bool),
                **since,
            )
            weighed.append(weights)
            watch.traces(questions, found)
            by_id = {q.id: q for q in questions}
            for trace, weight in zip(found, weights.weights.tolist(), strict=True):
                if weight > 0:
                    prompt = run.posterior.prompt_ids(by_id[trace.question_id])
                    yield Example.of(trace.question_id, prompt, trace.thought_ids, weight)
        metrics = {k: v for k, v in summarise(weighed).items() if "bound" not in k}
        watch.report(opened, metrics | staleness_metrics(behind))

    inputs = [traces, answers, verdicts, *([policy_scores] if policy_scores else [])]
    return write_training_phase(run, name, config=config, inputs=inputs, build=build)


def _since_sampled(
    traces: Sequence[Trace], policy_scores: Phase | None, part: int
) -> dict[str, torch.Tensor]:
    """Log-probs of the thoughts under the newest policy and as recorded, for `forward_kl_weights`."""
    if policy_scores is None:
        return {}
    scores = policy_score_store(policy_scores).read_keyed(["thought"], parts=[part])
    now, offsets = ragged(
        [scores[t.question_id, t.index]["thought"] if t.closed else NO_LOGPROBS for t in traces]
    )
    then, _ = ragged([t.thought_logprobs if t.closed else NO_LOGPROBS for t in traces])
    return {"policy_logprobs": now, "sampled_logprobs": then, "cu_seqlens": offsets}


def _examples(run: Run, arm: Arm, table: ProposalTable, weights: TraceWeights) -> Iterator[Example]:
    """The part's examples, grouped by question; a question's weights sum to one or it is left out."""
    shares = None
    if arm.answer == "sampled":
        shares = share_over_answers(weights.weights, table.answer_scores, table.answer_offsets)
    offsets, answer_offsets = table.offsets.tolist(), table.answer_offsets.tolist()
    for place, question in enumerate(table.questions):
        chosen: list[Example] = []
        prompt = run.policy.prompt_ids(question)
        for n in range(offsets[place], offsets[place + 1]):
            weight, thought = float(weights.weights[n]), table.traces[n].thought_ids
            routes = run.routes(table.traces[n], prompt, len(thought))
            if weight == 0:
                continue
            if shares is None or weights.outcomes[place] == "gml":
                response = np.concatenate([thought, run.policy.answer_ids(question.solution)])
                chosen.append(Example.of(question.id, prompt, response, weight, experts=routes))
                continue
            for a in range(answer_offsets[n], answer_offsets[n + 1]):
                if shares[a] > 0:
                    response = np.concatenate([thought, table.answer_ids[a]])
                    share = float(shares[a])
                    chosen.append(Example.of(question.id, prompt, response, share, experts=routes))
        original = weights.outcomes[place] == "original" or arm.mix
        if not original:
            yield from chosen
            continue
        share = 0.5 if chosen else 1.0
        yield dataset_example(run.policy, question, with_answer=True, weight=share)
        for e in chosen:
            yield replace(e, weight=e.weight * (1 - share))


def _rows(traces: Sequence[Trace], weights: TraceWeights) -> Iterable[dict[str, Any]]:
    columns = {
        "weight": weights.weights,
        "normalised": weights.normalised,
        "log_ratio": weights.log_ratio,
        "log_rho": weights.log_rho,
        "bound": weights.bounds,
    }
    lists = {name: values.tolist() for name, values in columns.items()}
    for n, trace in enumerate(traces):
        yield {
            "question_id": trace.question_id,
            "role": trace.role,
            "index": trace.index,
            **{name: values[n] for name, values in lists.items()},
        }
