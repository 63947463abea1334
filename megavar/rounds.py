"""One round of variational reasoning, as the paper runs it (arXiv 2509.22637, Algorithm 1 with T = 1); for T > 1 see
`megavar.online` and `megavar.policy_rounds`.

Each line below is a phase: a directory of the run with a manifest. Run it again and finished phases are read, a torn
one goes on where it was killed. Every rank executes this file; what a phase does is in `megavar/phases/`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from megavar.config.recipe import Fit, Recipe
from megavar.config.switches import PROPOSED
from megavar.files import write_atomically
from megavar.objectives.registry import needs_of, posterior_counts_answers
from megavar.online import online_rounds
from megavar.phases.evaluation import Result, evaluate, held_out_accuracy
from megavar.phases.fitting import dataset_training_set, fit_phase
from megavar.phases.material import Material, training_set
from megavar.phases.posterior_weighing import own_posterior_training_set
from megavar.phases.run import Run, StopRun
from megavar.phases.sampling import sample
from megavar.phases.steps import (
    answer_and_verify,
    initial_policy,
    judge,
    judge_own,
    policy_traces,
    posterior_traces,
    whole_samples,
)
from megavar.phases.walk import Walk
from megavar.phases.weighing import forward_kl_training_set
from megavar.policy_rounds import policy_rounds
from megavar.report.show import PLAIN_WIDTH, arms_table
from megavar.runs import TABLE, Phase
from megavar.trainer.fit import num_steps


def main(path: Path, *, until: str | None = None) -> None:
    """Run what is missing of the run in `path`; called on every rank. `until`: stop after this phase."""
    run = Run.enter(path, until=until)
    try:
        results = every_round(run)
    except StopRun:
        results = []
    if results and run.groups.is_main:
        rows = [row(run, result) for result in results]
        table, text = path / TABLE, json.dumps({"rows": rows}, indent=1) + "\n"
        if not table.exists() or table.read_text() != text:
            write_atomically(table, text)
        Console(file=sys.stdout, width=PLAIN_WIDTH).print(arms_table(table))
    run.leave()


def phase_names(recipe: Recipe) -> list[str]:
    """The phases of this recipe's rounds, in order."""
    walk = Walk(recipe)
    every_round(walk)
    return walk.names


def every_round(run: Run) -> list[Result]:
    """The paper's one round over all arms, or as many rounds of one arm as the recipe asks for."""
    if run.recipe.rounds == 1:
        return offline_round(run)
    return online_rounds(run) if run.recipe.arms[0].objective in PROPOSED else policy_rounds(run)


def offline_round(run: Run) -> list[Result]:
    """The nine steps of the paper, then every arm trained for the same number of steps and evaluated."""
    recipe = run.recipe

    # 1. the initial policy pi_0 learns the data set's own traces
    seen, initial = initial_policy(run)

    # 2. the posterior q(z|x,y') is fitted, to the same traces or by forward KL to the policy's own
    posterior = fit_posterior(run, initial)

    # 3. to 7. the traces that the arms are made of: proposed by q, or the policy's own
    material = gather(run, seen, initial, posterior)

    judged = evaluate(run, "eval/initial", weights=initial)
    results = [Result(name="initial", verdicts=judged, data=None)]
    fit = same_steps(recipe, len(run.train))
    for arm in recipe.arms:
        # 8. weights rho~ turn traces into a training set;  9. the policy learns it
        data = training_set(run, f"arms/{arm.name}/data", arm, material)
        start = initial if recipe.warm_start == "initial" else None
        trained = fit_phase(run, f"arms/{arm.name}/fit", start=start, data=data, fit=fit)
        judged = evaluate(run, f"eval/{arm.name}", weights=trained)
        results.append(Result(name=arm.name, verdicts=judged, data=data))
    return results


def fit_posterior(run: Run, initial: Phase) -> Phase:
    """Phase 2, on the data set's traces or by forward KL: M policy traces per question, by their accuracy (Eq. 9).

    The objectives that need the posterior's own density go on from the former.
    """
    settings = run.recipe.posterior
    if settings.objective == "forward_kl":
        traces = sample(run, policy_traces(run, "posterior/traces", initial))
        answers, verdicts = answer_and_verify(run, "posterior", initial, traces)
        data = forward_kl_training_set(
            run, "posterior/data", traces=traces, answers=answers, verdicts=verdicts
        )
        return fit_phase(run, "posterior/fit", start=None, data=data, fit=settings.fit)
    data = dataset_training_set(
        run, "posterior/data", encoder=run.posterior, questions=run.train, with_answer=False
    )
    fitted = fit_phase(run, "posterior/fit", start=None, data=data, fit=settings.fit)
    if settings.objective == "sft":
        return fitted
    name, counted = "posterior/own", posterior_counts_answers(settings)
    traces = sample(run, posterior_traces(run, f"{name}/traces", fitted, stream=name, count=settings.traces))
    judged = judge(
        run, name, traces, policy=initial, posterior=fitted, answers=counted, stream=f"{name}/answer"
    )
    data = own_posterior_training_set(run, f"{name}/data", settings, judged)
    return fit_phase(run, f"{name}/fit", start=fitted, data=data, fit=settings.tune)


def gather(run: Run, seen: Phase, initial: Phase, posterior: Phase) -> Material:
    """Steps 3 to 7: what the arms need of traces, scores, answers and verdicts, each once for all arms."""
    needs = needs_of(run.recipe.arms)
    proposals = prompted = None
    if "proposals" in needs:
        traces = sample(run, posterior_traces(run, "proposals/traces", posterior))
        proposals = judge(
            run,
            "proposals",
            traces,
            policy=initial,
            posterior=posterior,
            answers="answers" in needs,
        )
    own = None
    if "own" in needs:
        traces = sample(run, whole_samples(run, "own/traces", initial))
        own = judge_own(run, "own", traces, needs, policy=initial, initial=initial, posterior=posterior)
    if "prompted" in needs:
        traces = sample(run, posterior_traces(run, "prompted/traces", initial, stream="prompted"))
        prompted = judge(run, "prompted", traces, policy=initial, posterior=initial, answers=False)
    return Material(seen=seen, proposals=proposals, own=own, prompted=prompted)


def same_steps(recipe: Recipe, questions: int) -> Fit:
    """Every arm takes as many steps as the recipe's final fit does on all training questions."""
    return recipe.final.model_copy(update={"steps": num_steps(recipe.final, questions)})


def row(run: Run, result: Result) -> dict[str, Any]:
    """One line of the table of arms."""
    correct = held_out_accuracy(run, result.verdicts)
    made = (result.data.manifest or {}) if result.data else {}
    counts = made.get("counts", {})
    # Bounds and ESS of other traces than the posterior's are of another kind; they are in the metrics.
    arm = next((a for a in run.recipe.arms if a.name == result.name), run.recipe.arms[0])
    metrics = made.get("metrics", {}) if arm.objective in PROPOSED else {}
    return {
        "arm": result.name,
        "accuracy": round(correct.mean, 4),
        "95% interval": [round(correct.low, 4), round(correct.high, 4)],
        "questions": counts.get("questions", ""),
        "examples": counts.get("examples", ""),
        "bound L_1": metrics.get("vr/bound_1", ""),
        f"bound L_{run.recipe.rollout.traces}": metrics.get(f"vr/bound_{run.recipe.rollout.traces}", ""),
        "ESS": metrics.get("vr/ess", ""),
    }
