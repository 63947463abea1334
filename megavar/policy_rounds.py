"""Rounds whose traces are the policy's own: no posterior is fitted, the newest policy samples and learns.

Round t fits pi_t to samples of pi_{t-1}, weighed by the arm's objective; everything else is as in `megavar.online`.
With `rollout.staleness` s the samples of round t come from pi_{max(0, t-1-s)}, and the arm's importance ratios take
the newest policy's log-probs over those that the engine recorded.
"""

from __future__ import annotations

from megavar.objectives.registry import needs_of
from megavar.online import lagged, policy_step, round_name
from megavar.phases.ahead import TraceStream
from megavar.phases.evaluation import Result, evaluate
from megavar.phases.material import Material, training_set
from megavar.phases.run import Run
from megavar.phases.sampling import Sampling
from megavar.phases.steps import initial_policy, judge, judge_own, posterior_traces, whole_samples


def policy_rounds(run: Run) -> list[Result]:
    """All rounds of the recipe's one arm, each evaluated."""
    recipe, lag = run.recipe, run.recipe.rollout.staleness
    (arm,) = recipe.arms
    needs = needs_of([arm])
    _, initial = initial_policy(run)
    policies = [initial]  # pi_0, pi_1, ...
    results = [Result(name="initial", verdicts=evaluate(run, "eval/initial", weights=initial), data=None)]

    def own(t: int) -> Sampling:
        sampler, newer = lagged(policies, t - 1, lag)
        return whole_samples(run, f"{round_name(t)}/own/traces", sampler, stream=f"policy/{t}", newer=newer)

    def hinted(t: int) -> Sampling | None:
        """Thoughts of the policy after the posterior's prompt."""
        if "prompted" not in needs:
            return None
        sampler, newer = lagged(policies, t - 1, lag)
        name = f"{round_name(t)}/prompted/traces"
        return posterior_traces(run, name, sampler, stream=f"prompted/{t}", newer=newer)

    with (
        TraceStream(run, own, rounds=recipe.rounds, staleness=lag) as own_traces,
        TraceStream(run, hinted, rounds=recipe.rounds, staleness=lag) as hinted_traces,
    ):
        for t in range(1, recipe.rounds + 1):
            policy, name = policies[-1], round_name(t)
            traces = own_traces.take()
            assert traces is not None
            samples = judge_own(run, f"{name}/own", traces, needs, policy=policy, initial=initial)
            asked, prompted = hinted_traces.take(), None
            if asked is not None:
                prompted = judge(
                    run,
                    f"{name}/prompted",
                    asked,
                    policy=policy,
                    posterior=policy,
                    answers=False,
                    fresh=t == 1 or not lag,
                )
            data = training_set(run, f"{name}/policy/data", arm, Material(own=samples, prompted=prompted))
            results.append(policy_step(run, t, policies, data))
    return results
