"""Claim 7: RFT, binary-reward RL, GRPO and the variational objective on questions of mixed difficulty, and debiased."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from claim_arms import plot as plot_arms
from intervals import paired
from markdown import arms_table, check_equal, table
from plots import COLOURS, figure
from replicate import Replicate, posterior_tokens, round_of, sampled_tokens
from task import LETTERS

from megavar.config.recipe import Arm
from megavar.objectives.registry import OBJECTIVES, needs_of
from megavar.phases.material import Material, training_set
from megavar.phases.sampling import sample
from megavar.phases.steps import judge_own, whole_samples
from megavar.phases.watch import question_store
from megavar.runs import Phase

PAIRS = (
    ("rft", "variational"),
    ("rft", "variational-full-ratio"),
    ("rft-debiased", "rft"),
    ("rft, online", "rft"),
    ("rl-debiased, online", "rl, online"),
    ("grpo, online", "rl, online"),
)
"""Arms compared letter by letter."""
BINS = ((0.0, 0.0), (0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.999), (0.999, 1.0))
"""Of a question's accuracy under the initial policy: above the first, up to the second number; the first bin is 0."""


def measure(replicate: Replicate) -> dict[str, Any]:
    """Arms on q's proposals, and arms on pi_0's own samples, as many as cost the same tokens."""
    arms = replicate.recipe.arms
    proposals = replicate.proposals()
    own = replicate.own(replicate.claim["own_samples"], arms)
    material = Material(proposals=proposals, own=own)
    spent = {
        "proposals": sampled_tokens(proposals.traces, proposals.answers) + posterior_tokens(replicate.run),
        "samples": sampled_tokens(own.traces),
    }
    run = replicate.with_traces(replicate.claim["own_samples"])
    found: dict[str, Any] = {}
    accuracy: dict[str, float] = {}
    weights: dict[str, dict[str, float]] = {}
    for arm in arms:
        kind = OBJECTIVES[arm.objective].kind
        used = replicate.run if kind == "proposals" else run
        found[arm.name] = replicate.arm(arm, material, sampled=spent[kind], run=used)
        rows = _questions(replicate, f"{replicate.arm_name(arm, material)}/data")
        weights[arm.name] = {question: row[1] for question, row in rows.items()}
        if kind == "samples":
            accuracy = {question: row[0] for question, row in rows.items()}
    for arm in arms:
        if arm.name in replicate.claim["online"]:
            found[f"{arm.name}, online"] = _online(replicate, arm)
    # As many samples are asked for; those of a policy that forgets how to go on are shorter.
    online = [name for name in found if name.endswith(", online")]
    one_trace = spent["samples"] / replicate.claim["own_samples"]
    check_equal(found, slice_tokens=one_trace, may_break=online)
    return {
        "initial": replicate.accuracy("initial", replicate.initial()),
        "arms": found,
        "implied": {name: _curve(accuracy, implied) for name, implied in weights.items()},
    }


def _online(replicate: Replicate, arm: Arm) -> dict[str, Any]:
    """The arm on fresh samples: rounds divide questions and steps, each samples from the newest policy."""
    rounds, initial = replicate.claim["rounds"], replicate.initial()
    fit = replicate.fit(rounds)
    own = replicate.with_traces(replicate.claim["own_samples"])
    size = len(own.train) // rounds
    policy, tokens, data = initial, 0, None
    for t in range(rounds):
        name = f"online/{arm.name}/{t + 1}"
        run = replicate.with_questions(own.train[t * size : (t + 1) * size], own)
        traces = sample(run, whole_samples(run, f"{name}/traces", policy, stream=f"own/{t}"))
        tokens += sampled_tokens(traces)
        samples = judge_own(run, name, traces, needs_of([arm]), policy=policy, initial=initial)
        data = training_set(run, f"{name}/data", arm, Material(own=samples))
        policy = replicate.train(name, data, fit=fit, start=policy, stretch=round_of(fit, t, rounds))
    return replicate.outcome(
        f"online/{arm.name}/last", policy, data=data, sampled=tokens, steps=rounds * (fit.steps or 0)
    )


def _questions(replicate: Replicate, name: str) -> dict[str, tuple[float, float]]:
    """Question -> accuracy and implied weight, from an arm's training-set phase."""
    path = replicate.run.directory.path / name
    phase = Phase(name=name, path=path, hash="", inputs={}, writer=False)
    rows = question_store(phase).read_keyed(["accuracy", "question_weight"])
    return {key[0]: (row["accuracy"], row["question_weight"]) for key, row in rows.items()}


def _curve(accuracy: dict[str, float], implied: dict[str, float]) -> list[list[float]]:
    """[accuracy of pi_0, questions, mean implied weight] for each accuracy that occurs."""
    groups: dict[float, list[float]] = defaultdict(list)
    for question, value in accuracy.items():
        groups[round(value, 6)].append(implied[question])
    return [[p, len(values), float(np.mean(values))] for p, values in sorted(groups.items())]


def binned(curve: list[list[float]], low: float, high: float) -> float:
    """Mean implied weight of the questions in a bin; NaN for none."""
    inside = [(n, w) for p, n, w in curve if (low < p <= high) or (p == 0 == high)]
    total = sum(n for n, _ in inside)
    return sum(n * w for n, w in inside) / total if total else float("nan")


def _mean_of_known(values: Iterable[float]) -> str:
    """Mean of the seeds that have a question in a bin."""
    seen = [value for value in values if not math.isnan(value)]
    return f"{sum(seen) / len(seen):.2f}" if seen else ""


def tables(whole: dict[str, Any]) -> str:
    seeds = whole["seeds"]
    first = next(iter(seeds.values()))
    names = list(first["arms"])
    return (
        arms_table(seeds, names, reference=names[0])
        + "\nDifferences by letter, from easy to hard:\n\n"
        + _by_letter(list(seeds.values()))
        + "\nImplied weight of a question, by pi_0's accuracy P on it (last two rows: theory):\n\n"
        + _by_accuracy([seed["implied"] for seed in seeds.values()])
    )


def _by_letter(seeds: list[dict[str, Any]]) -> str:
    """Table of the differences of PAIRS."""
    rows = []
    for first, second in PAIRS:
        if first in seeds[0]["arms"] and second in seeds[0]["arms"]:
            one, other = ([s["arms"][name]["by"] for s in seeds] for name in (first, second))
            cells = [paired([by[x] for by in one], [by[x] for by in other]).signed for x in LETTERS]
            rows.append([f"{first} - {second}", *cells])
    return table(["", *LETTERS], rows)


def _by_accuracy(implied: list[dict[str, list[list[float]]]]) -> str:
    """Table of the implied weights; implied: a seed's curve of each arm."""
    curves = {name: [seed[name] for seed in implied] for name in implied[0]}
    for label, rule in (
        ("*P*", lambda p: p),
        ("*sqrt(P/(1-P))*", lambda p: math.sqrt(p / (1 - p)) if p < 1 else 0),
    ):
        curves[label] = [[[p, n, rule(p)] for p, n, _ in seed["variational"]] for seed in implied]
    rows = [
        [name, *(_mean_of_known(binned(curve, low, high) for curve in own) for low, high in BINS)]
        for name, own in curves.items()
    ]
    return table(
        ["arm", *(f"P = {high:.0f}" if high in (0, 1) else f"up to {high}" for _, high in BINS)], rows
    )


def plot(whole: dict[str, Any], path: Path) -> None:
    plot_arms(whole, path)
    seeds = list(whole["seeds"].values())
    with figure(path.with_name(f"{path.stem}_weights.svg"), width=5.0, height=3.2) as (axis,):
        for colour, name in zip(COLOURS, seeds[0]["implied"], strict=False):
            rows = np.array([row for seed in seeds for row in seed["implied"][name]])
            levels = np.unique(rows[:, 0])
            means = [np.average(rows[rows[:, 0] == p, 2], weights=rows[rows[:, 0] == p, 1]) for p in levels]
            axis.plot(levels, means, "o", ms=2.5, color=colour, label=name)
        grid = np.linspace(0, 0.97, 100)
        axis.plot(grid, grid, "k-", lw=0.8, label="P")
        axis.plot(grid, np.sqrt(grid / (1 - grid)), "k--", lw=0.8, label="sqrt(P/(1-P))")
        axis.axhline(1, color="k", lw=0.8, ls=":")
        axis.set(xlabel="accuracy P of the initial policy", ylabel="implied weight", ylim=(0, 4))
        axis.legend(fontsize=6.5, ncols=2)
