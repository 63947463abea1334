"""Claim 3: K traces in the bound, all else equal.

Every arm trains on the same k_max traces per question and so has the same sampled tokens, examples and steps; what
differs is the size K of the groups within which weights are normalised. K = 1 is the plain likelihood of q's traces
(the ELBO's gradient, A.6), K = k_max one multi-trace bound over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from intervals import over_seeds, paired
from markdown import arms_table, check_equal, table
from plots import COLOURS, figure, line, sizes_axis
from replicate import Replicate, posterior_tokens, sampled_tokens

from megavar.data.training_set import Example
from megavar.objectives.diagnostics import summarise
from megavar.objectives.weights import TraceWeights, weigh
from megavar.phases.fitting import write_training_phase
from megavar.phases.run import OpenPhase
from megavar.phases.tables import Proposals, ProposalTable
from megavar.runs import Phase


def measure(replicate: Replicate) -> dict[str, Any]:
    most, estimator = replicate.claim["most"], replicate.claim["estimator"]
    run = replicate.with_traces(most)
    proposals = replicate.proposals(f"proposals-{most}", run=run, answers=False)
    tokens = sampled_tokens(proposals.traces) + posterior_tokens(replicate.run)
    arms: dict[str, Any] = {}
    for ratio, sizes in replicate.claim["sizes"].items():
        for size in sizes:
            # Weights within groups of one are one, whatever the ratio.
            name = f"{ratio}-{size}" if size > 1 else "any-1"
            if name not in arms:
                directory = f"traces/{estimator}-{name}"
                data = grouped_training_set(replicate, directory, proposals, ratio, estimator, size)
                trained = replicate.train(directory, data)
                arms[name] = replicate.outcome(directory, trained, data=data, sampled=tokens)
                arms[name]["bound"] = (data.manifest or {})["metrics"][f"vr/bound_{size}"]
    check_equal(arms, slice_tokens=0)
    return {"initial": replicate.accuracy("initial", replicate.initial()), "arms": arms}


def grouped_training_set(
    replicate: Replicate, name: str, proposals: Proposals, ratio: str, estimator: str, size: int
) -> Phase:
    """A question's mass of one, shared evenly by its groups of `size` traces."""
    run = replicate.run
    config = {"ratio": ratio, "estimator": estimator, "size": size, "questions": run.digest(run.train)}

    def build(opened: OpenPhase) -> Iterator[Example]:
        weighed: list[TraceWeights] = []
        for part, questions in enumerate(run.parts(run.train)):
            proposed = ProposalTable.read(proposals, part, questions)
            scored = proposed.scored(estimator)
            groups = len(proposed.traces) // size
            weights = weigh(
                replace(
                    scored,
                    question_ids=tuple(f"{part}/{group}" for group in range(groups)),
                    question_offsets=torch.arange(groups + 1) * size,
                ),
                ratio=ratio,  # type: ignore[arg-type]
            )
            weighed.append(weights)
            by_id = {question.id: question for question in questions}
            share = size / (len(proposed.traces) / len(questions))
            for trace, weight in zip(proposed.traces, weights.weights.tolist(), strict=True):
                if weight > 0:
                    question = by_id[trace.question_id]
                    response = np.concatenate([trace.thought_ids, run.policy.answer_ids(question.solution)])
                    yield Example.of(question.id, run.policy.prompt_ids(question), response, weight * share)
        opened.metrics |= {f"vr/{key}": value for key, value in summarise(weighed).items()}

    return write_training_phase(run, name, config=config, inputs=proposals.phases, build=build)


def tables(whole: dict[str, Any]) -> str:
    seeds = whole["seeds"]
    names = list(next(iter(seeds.values()))["arms"])
    text = arms_table(seeds, names, reference=names[0])
    rows = [
        [name, over_seeds([float(s["arms"][name]["bound"]) for s in seeds.values()])] for name in names[1:]
    ]
    text += "\nL_K of the training questions under the initial policy (a bound for the full ratio alone):\n\n"
    text += table(["arm", "L_K"], rows)
    ratios = sorted({name.partition("-")[0] for name in names[1:]})
    for ratio in ratios:
        last = [name for name in names if name.startswith(f"{ratio}-")][-1]
        gain = paired(
            [s["arms"][last]["accuracy"] for s in seeds.values()],
            [s["arms"][names[0]]["accuracy"] for s in seeds.values()],
        )
        text += f"\nFrom K = 1 to {last}: {gain.signed}.\n"
    return text


def plot(whole: dict[str, Any], path: Path) -> None:
    seeds = list(whole["seeds"].values())
    names = list(seeds[0]["arms"])
    with figure(path, 2) as axes:
        for colour, ratio in zip(COLOURS, sorted({n.partition("-")[0] for n in names[1:]}), strict=False):
            own = [n for n in names if n.startswith(f"{ratio}-")]
            for axis, key in zip(axes, ("accuracy", "bound"), strict=True):
                values = [[_above(s, n, names[0], key) for s in seeds] for n in own]
                line(axis, sizes_of(own), values, label=f"{ratio} ratio", colour=colour)
        for axis, label in zip(axes, ("accuracy minus that of K = 1", "L_K, nats"), strict=True):
            sizes_axis(axis, sizes_of(names[1:]), xlabel="K", ylabel=label)
            axis.legend(fontsize=7)


def _above(seed: dict[str, Any], name: str, reference: str, key: str) -> float:
    """An arm's accuracy above the reference's, or its bound."""
    start = seed["arms"][reference][key] if key == "accuracy" else 0.0
    return float(seed["arms"][name][key]) - float(start)


def sizes_of(names: list[str]) -> list[int]:
    return sorted({int(name.rpartition("-")[2]) for name in names})
