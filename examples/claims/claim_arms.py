"""Arms of the recipe on the same K proposals: estimators of c(z) (claim 5), selection and mixing (claim 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markdown import arms_table, check_equal
from plots import bars, figure
from replicate import Replicate, posterior_tokens, sampled_tokens
from task import LETTERS

from megavar.phases.material import Material


def measure(replicate: Replicate) -> dict[str, Any]:
    """All arms have the same traces and answers, and all are charged for both, whether or not they read the answers."""
    proposals = replicate.proposals()
    tokens = sampled_tokens(proposals.traces, proposals.answers) + posterior_tokens(replicate.run)
    material = Material(proposals=proposals)
    arms = {arm.name: replicate.arm(arm, material, sampled=tokens) for arm in replicate.recipe.arms}
    check_equal(arms, slice_tokens=0)
    return {"initial": replicate.accuracy("initial", replicate.initial()), "arms": arms}


def tables(whole: dict[str, Any]) -> str:
    seeds = whole["seeds"]
    names = list(next(iter(seeds.values()))["arms"])
    return arms_table(seeds, names, reference=names[0])


def plot(whole: dict[str, Any], path: Path) -> None:
    seeds = list(whole["seeds"].values())
    reference, *names = seeds[0]["arms"]
    groups = {
        f"letter {letter}": [
            [s["arms"][name]["by"][letter] - s["arms"][reference]["by"][letter] for s in seeds]
            for name in names
        ]
        for letter in LETTERS
    }
    with figure(path, width=1.6 + 0.75 * len(names)) as (axis,):
        bars(axis, names, groups, ylabel=f"accuracy minus that of\n{reference}")
        axis.legend(ncols=4, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
