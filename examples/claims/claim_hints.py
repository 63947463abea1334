"""Claim 4: traces of q with and without the hint; two templates; q fitted on other questions; q fitted by plain SFT.

To random weights all marks are alike, so the templates are compared on copies of pi_0, which knows one of the two.
The tokens that fit a posterior count: without one, or with one that learns the teacher's traces, as many more traces
are sampled for the policy.
"""

from __future__ import annotations

from typing import Any

from claim_arms import plot
from intervals import over_seeds
from markdown import arms_table, check_equal, table
from quality import thoughts
from replicate import Replicate, posterior_tokens, sampled_tokens

from megavar.config.recipe import Arm
from megavar.phases.material import Material
from megavar.phases.run import Run
from megavar.phases.tables import Proposals

__all__ = ["measure", "plot", "tables"]


def measure(replicate: Replicate) -> dict[str, Any]:
    run, initial = replicate.run, replicate.initial()
    more = replicate.with_traces(replicate.claim["traces_without_fit"])
    other = replicate.claim["other_template"]

    found: dict[str, tuple[Proposals, Run, int]] = {}
    found["hint"] = replicate.proposals(), run, posterior_tokens(run)

    unhinted = replicate.with_posterior_prompt(run.recipe.templates.policy, more)
    found["no hint"] = (
        replicate.proposals("proposals-unhinted", posterior=initial, run=unhinted),
        unhinted,
        0,
    )

    for label, name in (
        ("q from pi_0", run.recipe.templates.posterior),
        ("q from pi_0, other template", other),
    ):
        prompted = replicate.with_posterior_prompt(name)
        q = replicate.posterior(f"posterior-copy-{name}", prompted, start=initial)
        proposals = replicate.proposals(f"proposals-copy-{name}", posterior=q, run=prompted)
        found[label] = proposals, prompted, posterior_tokens(run, f"posterior-copy-{name}")

    elsewhere = replicate.with_questions(replicate.others[: len(run.train)])
    q = replicate.posterior("posterior-disjoint", elsewhere)
    proposals = replicate.proposals("proposals-disjoint", posterior=q)
    found["disjoint questions"] = proposals, run, posterior_tokens(run, "posterior-disjoint")

    q = replicate.taught_posterior()
    found["teacher's traces"] = replicate.proposals("proposals-taught", posterior=q, run=more), more, 0

    arms: dict[str, Any] = {}
    quality = {}
    shown = {question.id: question.solution for question in run.train}
    for label, (proposals, used, fitted) in found.items():
        tokens = sampled_tokens(proposals.traces, proposals.answers) + fitted
        quality[label] = thoughts(replicate, proposals.traces, shown)
        for arm in _arms(replicate, label):
            name = label if arm.ratio != "full" else f"{label}, full ratio"
            arms[name] = replicate.arm(arm, Material(proposals=proposals), sampled=tokens, run=used)
    one_trace = sampled_tokens(found["hint"][0].traces, found["hint"][0].answers) / run.recipe.rollout.traces
    check_equal(arms, slice_tokens=one_trace)
    return {"initial": replicate.accuracy("initial", initial), "arms": arms, "quality": quality}


def _arms(replicate: Replicate, label: str) -> list[Arm]:
    """Without a hint q is pi, and every ratio one."""
    return list(replicate.recipe.arms[:1] if label == "no hint" else replicate.recipe.arms)


def tables(whole: dict[str, Any]) -> str:
    seeds = whole["seeds"]
    first = next(iter(seeds.values()))
    text = arms_table(seeds, list(first["arms"]), reference="no hint")
    keys = ("right", "shortcut", "follows", "entropy", "distinct")
    rows = [
        [label, *(over_seeds([s["quality"][label][key] for s in seeds.values()]) for key in keys)]
        for label in first["quality"]
    ]
    text += "\nThe traces themselves: without a slip; right answer in spite of a slip; the answer shown is reached; "
    text += "nats per token; share of a question's traces that differ:\n\n"
    return text + table(["posterior", *keys], rows)
