"""Rounds of variational reasoning (arXiv 2509.22637, Algorithm 1 with T > 1): posterior and policy teach each other.

Round t fits q_t to traces of the policy that were right, lets q_t propose traces, and fits pi_t to those, weighed by
pi_{t-1} / q. Each model goes on from its own weights and optimizer state; one learning-rate schedule spans all rounds.
As in the offline round every line is a phase, so a run resumes where it was killed. Arms whose traces are the policy's
own take no posterior: see `megavar.policy_rounds`.

With `rollout.staleness` s, traces come from models up to s rounds older, so that they can be sampled while the ranks
train: round t learns from traces of pi_{max(0, t-1-s)} and q_{max(1, t-s)}, whether or not they were ready early.
Weights always divide by the density that a trace was drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence

from megavar.config.recipe import Fit
from megavar.objectives.registry import needs_of
from megavar.phases.ahead import TraceStream
from megavar.phases.evaluation import Result, evaluate
from megavar.phases.fitting import dataset_training_set, fit_phase
from megavar.phases.run import Run
from megavar.phases.sampling import Sampling, sample
from megavar.phases.scoring import score_under_policy
from megavar.phases.steps import (
    answer_and_verify,
    initial_policy,
    judge,
    judge_own,
    policy_traces,
    posterior_traces,
    whole_samples,
)
from megavar.phases.weighing import forward_kl_training_set, variational_training_set
from megavar.runs import Phase
from megavar.trainer.fit import Stretch, num_steps


def online_rounds(run: Run) -> list[Result]:
    """All rounds of the recipe's one arm, each evaluated."""
    recipe, lag = run.recipe, run.recipe.rollout.staleness
    (arm,) = recipe.arms
    needs = needs_of([arm])
    _, initial = initial_policy(run)
    policies, posteriors = [initial], list[Phase]()  # pi_0, pi_1, ...;  q_1, q_2, ...
    results = [Result(name="initial", verdicts=evaluate(run, "eval/initial", weights=initial), data=None)]

    def own(t: int) -> Sampling | None:
        """Traces of the policy. Where the recipe says so, the first posterior learns the data set's instead."""
        if t == 1 and recipe.posterior.objective == "sft":
            return None
        sampler, newer = lagged(policies, t - 1, lag)
        name = f"{round_name(t)}/posterior/traces"
        return policy_traces(run, name, sampler, stream=f"policy/{t}", newer=newer)

    def proposed(t: int) -> Sampling:
        sampler, newer = lagged(posteriors, t - 1, lag)
        name = f"{round_name(t)}/proposals/traces"
        return posterior_traces(run, name, sampler, stream=f"posterior/{t}", newer=newer)

    with (
        TraceStream(run, own, rounds=recipe.rounds, staleness=lag) as own_traces,
        TraceStream(run, proposed, rounds=recipe.rounds, staleness=lag) as proposals,
    ):
        for t in range(1, recipe.rounds + 1):
            policy, name = policies[-1], round_name(t)

            # the posterior step, and traces of what it made
            stale = lag > 0 and t > 1
            data = posterior_data(run, t, policy, own_traces.take(), stale=stale)
            posterior = fit_phase(
                run,
                f"{name}/posterior/fit",
                start=posteriors[-1] if posteriors else None,
                data=data,
                fit=recipe.posterior.fit,
                stretch=stretch(run, recipe.posterior.fit, t),
            )
            posteriors.append(posterior)
            traces = proposals.take()
            assert traces is not None

            # the policy step
            source, _ = lagged(posteriors, t - 1, lag)
            judged = judge(
                run,
                f"{name}/proposals",
                traces,
                policy=policy,
                posterior=source,
                answers="answers" in needs,
                stream=f"answer/{t}",
            )
            samples = None
            if "own" in needs:  # the policy's share of a mixed proposal
                asked = whole_samples(run, f"{name}/own/traces", policy, stream=f"own/{t}")
                samples = judge_own(
                    run,
                    f"{name}/own",
                    sample(run, asked),
                    needs,
                    policy=policy,
                    initial=initial,
                    posterior=source,
                )
            data = variational_training_set(run, f"{name}/policy/data", arm, judged, samples)
            results.append(policy_step(run, t, policies, data))
    return results


def lagged(models: Sequence[Phase], newest: int, lag: int) -> tuple[Phase, dict[str, int]]:
    """What samples: the model `lag` rounds older than `models[newest]`, which need not be there yet, or the first.

    The second value is its name -> by how many rounds it lags, for `policy_traces` and the like.
    """
    used = max(0, newest - lag)
    return models[used], {models[used].name: newest - used}


def policy_step(run: Run, t: int, policies: list[Phase], data: Phase) -> Result:
    """Fit pi_t, from the newest of `policies` to `data`; it joins them and is evaluated."""
    policy = fit_phase(
        run,
        f"{round_name(t)}/policy/fit",
        start=policies[-1],
        data=data,
        fit=run.recipe.final,
        stretch=stretch(run, run.recipe.final, t),
    )
    policies.append(policy)
    verdicts = evaluate(run, f"{round_name(t)}/eval", weights=policy)
    return Result(name=f"round {t}", verdicts=verdicts, data=data)


def posterior_data(run: Run, t: int, policy: Phase, traces: Phase | None, *, stale: bool) -> Phase:
    """What q_t learns: the policy's traces by how often the policy answers right behind them (Eq. 9)."""
    name = f"{round_name(t)}/posterior"
    if traces is None:
        return dataset_training_set(
            run, f"{name}/data", encoder=run.posterior, questions=run.train, with_answer=False
        )
    answers, verdicts = answer_and_verify(run, name, policy, traces, stream=f"answer/{t}")
    # Traces of an older policy also count for how much likelier the newest one makes them.
    now = score_under_policy(run, f"{name}/policy_scores", weights=policy, traces=traces) if stale else None
    return forward_kl_training_set(
        run, f"{name}/data", traces=traces, answers=answers, verdicts=verdicts, policy_scores=now
    )


def stretch(run: Run, fit: Fit, t: int) -> Stretch:
    """Round t's part of a model's optimizer steps: each round takes as many as the fit says for all questions."""
    steps = num_steps(fit, len(run.train))
    return Stretch(first=(t - 1) * steps, last=t * steps, steps=run.recipe.rounds * steps)


def round_name(t: int) -> str:
    return f"rounds/{t:03}"
