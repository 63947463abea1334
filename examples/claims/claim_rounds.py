"""Claim 8: one offline round (T = 1) against T online rounds, with as many tokens and steps in all.

T rounds divide the training questions and the steps among them: each round samples from the newest models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from claim_arms import tables
from markdown import check_equal
from plots import COLOURS, figure, line, sizes_axis
from replicate import Replicate, round_of, sampled_tokens

from megavar.config.recipe import Arm
from megavar.phases.fitting import fit_phase
from megavar.phases.sampling import sample
from megavar.phases.steps import answer_and_verify, judge, policy_traces, posterior_traces
from megavar.phases.weighing import forward_kl_training_set, variational_training_set

__all__ = ["measure", "plot", "tables"]


def measure(replicate: Replicate) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in replicate.recipe.arms:
        for rounds in replicate.claim["rounds"]:
            arms[f"{arm.name}, T={rounds}"] = _online(replicate, arm, rounds)
    # K traces of q and as many of pi, each with its answers.
    one_trace = min(arm["sampled_tokens"] for arm in arms.values()) / replicate.claim["traces"] / 2
    check_equal(arms, slice_tokens=one_trace)
    return {"initial": replicate.accuracy("initial", replicate.initial()), "arms": arms}


def _online(replicate: Replicate, arm: Arm, rounds: int) -> dict[str, Any]:
    """Algorithm 1 with T rounds; see `megavar.online`, which gives every round all questions."""
    whole, recipe = replicate.with_traces(replicate.claim["traces"]), replicate.recipe
    questions = whole.train
    policy_fit = replicate.fit(rounds)
    steps = replicate.claim["posterior_steps"] // rounds
    posterior_fit = recipe.posterior.fit.model_copy(update={"steps": steps})
    policy, q, tokens, data = replicate.initial(), None, 0, None
    size = len(questions) // rounds
    for t in range(rounds):
        run = replicate.with_questions(questions[t * size : (t + 1) * size], whole)
        name = f"rounds/{arm.name}-{rounds}/{t + 1}"

        # the posterior step
        traces = sample(run, policy_traces(run, f"{name}/posterior/traces", policy, stream=f"policy/{t}"))
        answers, verdicts = answer_and_verify(
            run, f"{name}/posterior", policy, traces, stream=f"posterior-answer/{t}"
        )
        tokens += sampled_tokens(traces, answers)
        data = forward_kl_training_set(
            run, f"{name}/posterior/data", traces=traces, answers=answers, verdicts=verdicts
        )
        q = fit_phase(
            run,
            f"{name}/posterior/fit",
            start=q,
            data=data,
            fit=posterior_fit,
            stretch=round_of(posterior_fit, t, rounds),
        )

        # the policy step
        traces = sample(run, posterior_traces(run, f"{name}/proposals/traces", q, stream=f"posterior/{t}"))
        judged = judge(
            run, f"{name}/proposals", traces, policy=policy, posterior=q, answers=True, stream=f"answer/{t}"
        )
        tokens += sampled_tokens(judged.traces, judged.answers)
        data = variational_training_set(run, f"{name}/policy/data", arm, judged)
        policy = replicate.train(
            f"{name}/policy", data, fit=policy_fit, start=policy, stretch=round_of(policy_fit, t, rounds)
        )
    return replicate.outcome(
        f"rounds/{arm.name}-{rounds}/last",
        policy,
        data=data,
        sampled=tokens,
        steps=rounds * (policy_fit.steps or 0),
    )


def plot(whole: dict[str, Any], path: Path) -> None:
    seeds = list(whole["seeds"].values())
    names = list(seeds[0]["arms"])
    with figure(path) as (axis,):
        for colour, arm in zip(COLOURS, dict.fromkeys(n.partition(",")[0] for n in names), strict=False):
            own = [n for n in names if n.partition(",")[0] == arm]
            values = [[s["arms"][n]["accuracy"] - s["arms"][own[0]]["accuracy"] for s in seeds] for n in own]
            sizes = [int(n.partition("=")[2]) for n in own]
            line(axis, sizes[1:], values[1:], label=arm, colour=colour)
        axis.axhline(0, color="k", lw=0.6)
        sizes_axis(
            axis, sizes, xlabel="rounds T", ylabel=f"accuracy minus that of {own[0].partition(', ')[2]}"
        )
