"""Claim 2: fitting q by forward KL or by reverse KL: collapse, use of the hint, entropy over training.

Both go on from the q that learnt the teacher's traces, in rounds with fresh samples: forward KL from pi_0's traces
weighed by their accuracy (Eq. 9), reverse KL from q's own by policy gradient (Eq. 34). After each round q is looked at
under the right hint and under a wrong one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervals import over_seeds, paired
from markdown import arms_table, check_equal, table
from plots import COLOURS, figure, line
from quality import thoughts
from replicate import Replicate, round_of, sampled_tokens

from megavar.config.recipe import Fit
from megavar.data.records import Question
from megavar.objectives.segments import segment_sum
from megavar.phases.fitting import fit_phase
from megavar.phases.material import Material
from megavar.phases.posterior_weighing import own_posterior_training_set
from megavar.phases.run import Run
from megavar.phases.sampling import sample
from megavar.phases.steps import answer_and_verify, judge, policy_traces, posterior_traces
from megavar.phases.tables import ProposalTable
from megavar.phases.weighing import forward_kl_training_set
from megavar.runs import Phase

KEYS = ("right", "shortcut", "follows", "follows_wrong", "entropy", "distinct", "kl", "elbo")


def measure(replicate: Replicate) -> dict[str, Any]:
    start, rounds, fit = (
        replicate.taught_posterior(),
        replicate.claim["rounds"],
        Fit(**replicate.claim["fit"]),
    )
    looks: dict[str, list[dict[str, float]]] = {}
    arms: dict[str, Any] = {}
    shared = _look(replicate, "kl/start", start)
    for objective in ("forward_kl", "reverse_kl"):
        q, tokens, looks[objective] = start, 0, [shared]
        for number in range(rounds):
            name = f"kl/{objective}/{number + 1}"
            size = len(replicate.run.train) // rounds
            run = replicate.with_questions(replicate.run.train[number * size : (number + 1) * size])
            data, spent = _training_set(replicate, run, name, objective, q)
            stretch = round_of(fit, number, rounds)
            q = fit_phase(replicate.run, f"{name}/fit", start=q, data=data, fit=fit, stretch=stretch)
            tokens += spent
            looks[objective].append(_look(replicate, name, q))
        proposals = replicate.proposals(f"kl/{objective}/proposals", posterior=q)
        tokens += sampled_tokens(proposals.traces, proposals.answers)
        for arm in replicate.recipe.arms:
            label = f"{objective}, {arm.name}"
            arms[label] = replicate.arm(arm, Material(proposals=proposals), sampled=tokens)
    # As many samples are asked for; a thought that reverse KL leaves without an end gets no answers.
    broken = [name for name in arms if name.startswith("reverse_kl")]
    one_trace = max(arm["sampled_tokens"] for arm in arms.values()) / (2 * replicate.recipe.rollout.traces)
    check_equal(arms, slice_tokens=one_trace, may_break=broken)
    initial = replicate.accuracy("initial", replicate.initial())
    return {"initial": initial, "arms": arms, "looks": looks}


def _training_set(replicate: Replicate, run: Run, name: str, objective: str, q: Phase) -> tuple[Phase, int]:
    """One round's examples and the tokens they took."""
    initial = replicate.initial()
    if objective == "forward_kl":
        traces = sample(run, policy_traces(run, f"{name}/traces", initial, stream=name))
        answers, verdicts = answer_and_verify(run, name, initial, traces, stream=f"{name}/answers")
        data = forward_kl_training_set(run, f"{name}/data", traces=traces, answers=answers, verdicts=verdicts)
        return data, sampled_tokens(traces, answers)
    traces = sample(run, posterior_traces(run, f"{name}/traces", q, stream=name))
    judged = judge(run, name, traces, policy=initial, posterior=q, answers=True, stream=f"{name}/answers")
    settings = run.recipe.posterior.model_copy(update={"objective": objective})
    data = own_posterior_training_set(run, f"{name}/data", settings, judged)
    return data, sampled_tokens(traces, judged.answers)


def _look(replicate: Replicate, name: str, q: Phase) -> dict[str, float]:
    """q's thoughts on some training questions, under the right answer and under another question's."""
    some = replicate.run.train[: replicate.claim["looked_at"]]
    right = replicate.with_questions(some)
    traces = sample(right, posterior_traces(right, f"{name}/look/traces", q, stream="look"))
    found = thoughts(replicate, traces, {question.id: question.solution for question in some})
    judged = judge(right, f"{name}/look", traces, policy=replicate.initial(), posterior=q, answers=False)
    ratios, elbos = [], []
    for part, questions in enumerate(right.parts(right.train)):
        proposed = ProposalTable.read(judged, part, questions)
        closed = proposed.closed
        log_ratio = proposed.log_ratio()[closed]
        log_c = segment_sum(proposed.reference.double(), proposed.reference_offsets)[closed]
        ratios += log_ratio.tolist()
        elbos += (log_c - log_ratio).tolist()
    found["kl"], found["elbo"] = sum(ratios) / len(ratios), sum(elbos) / len(elbos)

    misled = replicate.with_questions(_wrong_hints(some))
    traces = sample(misled, posterior_traces(misled, f"{name}/misled/traces", q, stream="look"))
    shown = {question.id: question.solution for question in misled.train}
    found["follows_wrong"] = thoughts(replicate, traces, shown)["follows"]
    return found


def _wrong_hints(questions: Sequence[Question]) -> list[Question]:
    """Each with the solution of the next question that has another one."""
    found = []
    for place, question in enumerate(questions):
        following = (questions[(place + i) % len(questions)].solution for i in range(1, len(questions)))
        wrong = next(solution for solution in following if solution != question.solution)
        found.append(dataclasses.replace(question, solution=wrong))
    return found


def tables(whole: dict[str, Any]) -> str:
    seeds = whole["seeds"]
    first = next(iter(seeds.values()))
    rows = []
    for objective, looks in first["looks"].items():
        for number in range(len(looks)):
            each = [seed["looks"][objective][number] for seed in seeds.values()]
            rows.append([objective, number, *(over_seeds([e[key] for e in each]) for key in KEYS)])
    names = list(first["arms"])
    return (
        "q after each round (0: before the first): share of thoughts without a slip; right answer in spite of a "
        "slip; the right answer shown is reached; a wrong answer shown is reached; nats per token; share of a "
        "question's 8 thoughts that differ; KL(q||pi_0) and ELBO in nats per question:\n\n"
        + table(["objective", "round", *KEYS], rows)
        + "\nPolicies trained on the traces of the last q:\n\n"
        + arms_table(seeds, names, reference=names[0])
        + f"\nReverse minus forward after the last round: {_differences(list(seeds.values()))}.\n"
    )


def _differences(seeds: list[dict[str, Any]]) -> str:
    """Of the two objectives' last q, and of the policies that learnt from it."""
    found = []
    for key in ("entropy", "distinct", "shortcut", "follows_wrong", "elbo"):
        reverse, forward = ([s["looks"][o][-1][key] for s in seeds] for o in ("reverse_kl", "forward_kl"))
        found.append(f"{key} {paired(reverse, forward).signed}")
    for arm in dict.fromkeys(name.partition(", ")[2] for name in seeds[0]["arms"]):
        reverse, forward = (
            [s["arms"][f"{o}, {arm}"]["accuracy"] for s in seeds] for o in ("reverse_kl", "forward_kl")
        )
        found.append(f"accuracy of the policy ({arm}) {paired(reverse, forward).signed}")
    return "; ".join(found)


def plot(whole: dict[str, Any], path: Path) -> None:
    seeds = list(whole["seeds"].values())
    with figure(path, 4, width=2.7, height=2.6) as axes:
        for axis, key, label in zip(
            axes,
            ("entropy", "right", "shortcut", "follows_wrong"),
            (
                "nats per token",
                "thoughts without a slip",
                "right answer, with a slip",
                "follows a wrong hint",
            ),
            strict=True,
        ):
            for colour, objective in zip(COLOURS, seeds[0]["looks"], strict=False):
                count = len(seeds[0]["looks"][objective])
                values = [[s["looks"][objective][i][key] for s in seeds] for i in range(count)]
                line(axis, range(count), values, label=objective, colour=colour)
            axis.set(xlabel="round", title=label)
        axes[0].legend(fontsize=7)
