"""Claim 9: the per-token geometric mean of pi/q against the full ratio: bias and variance, by enumeration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from enumeration import THOUGHTS as WELL_FORMED
from enumeration import Enumerated, enumerated
from intervals import over_seeds
from markdown import table
from plots import COLOURS, figure, line, sizes_axis
from replicate import Replicate
from toys import THOUGHTS, Toy, grad, toys, tuples, weigh_tuples

RATIOS = ("full", "tempered", "geometric", "none")
SIZES = (1, 2, 4)


def exact() -> dict[str, Any]:
    """Toy questions: error of the expected gradient of the bound against grad log P, and the estimate's own spread.

    Both are norms relative to that of grad log P; summed over every K-tuple of thoughts.
    """
    return {toy.name: {ratio: _toy_errors(toy, ratio) for ratio in RATIOS} for toy in toys()}


def _toy_errors(toy: Toy, ratio: str) -> list[dict[str, float]]:
    joint = toy.log_pi + toy.log_c
    each = torch.stack([grad(joint[z], toy.thought, toy.answer) for z in range(THOUGHTS)])
    target = toy.log_true_posterior.detach().exp() @ each
    found = []
    for size in SIZES:
        index = tuples(THOUGHTS, size)
        probability = toy.log_q.detach()[index].sum(dim=1).exp()
        weights = weigh_tuples(toy, index, ratio=ratio).weights.view(-1, size)
        estimates = (weights[:, :, None] * each[index]).sum(dim=1)
        mean = probability @ estimates
        variance = (probability @ (estimates - mean).square()).sum()
        norm = target.norm()
        found.append(
            {
                "size": size,
                "bias": float((mean - target).norm() / norm),
                "spread": float(variance.sqrt() / norm),
            }
        )
    return found


def measure(replicate: Replicate) -> dict[str, Any]:
    """Tiny model: distance of the expected weights from the true posterior, and the weight of the right thought."""
    sizes, draws = replicate.claim["sizes"], replicate.claim["draws"]
    found: dict[str, Any] = {
        ratio: {"bias": [], "ess": [], "right_bias": [], "right_spread": []} for ratio in RATIOS
    }
    questions = enumerated(replicate, replicate.claim["per_letter"])
    for size in sizes:
        for ratio in RATIOS:
            every = [_errors(one, ratio, size, draws // size, replicate.seed) for one in questions]
            for key in found[ratio]:
                found[ratio][key].append(float(np.mean([errors[key] for errors in every])))
    for ratio in RATIOS:
        found[ratio]["limit_bias"] = float(np.mean([_limit_bias(one, ratio) for one in questions]))
    lengths = {
        "sizes": sizes,
        "posterior_mass_of_right": _mean(one.true_posterior[one.right] for one in questions),
    }
    return {**lengths, "ratios": found}


def _errors(one: Enumerated, ratio: str, size: int, groups: int, seed: int) -> dict[str, float]:
    index = one.draws(groups, size, seed)
    weighed = one.weigh(index, ratio)  # type: ignore[arg-type]
    weights = weighed.weights.view(groups, size).numpy()
    expected = np.bincount(index.ravel(), weights.ravel(), minlength=len(WELL_FORMED)) / groups
    right = (weights * (index == one.right)).sum(axis=1)
    return {
        "bias": float(np.abs(expected - one.true_posterior).sum() / 2),
        "ess": float(weighed.ess.mean()),
        "right_bias": float(right.mean() - one.true_posterior[one.right]),
        "right_spread": float(right.std()),
    }


def _limit_bias(one: Enumerated, ratio: str) -> float:
    """Total variation distance of what infinitely many traces would be weighed to, from the true posterior."""
    everything = np.arange(len(WELL_FORMED))[:, None]
    log_rho = one.weigh(everything, ratio).log_rho.numpy()  # type: ignore[arg-type]
    limit = one.log_q + log_rho
    limit = np.exp(limit - np.logaddexp.reduce(limit))
    return float(np.abs(limit - one.true_posterior).sum() / 2)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def tables(whole: dict[str, Any]) -> str:
    rows = []
    for name, toy in whole["exact"].items():
        for ratio in RATIOS:
            cells = (f"{e['bias']:.3f} / {e['spread']:.3f}" for e in toy[ratio])
            rows.append([name, ratio, *cells])
    text = "Exact, on the enumerable questions of `tests/objectives`: bias / spread of the gradient, relative to "
    text += "the norm of grad log P:\n\n" + table(["question", "ratio", *(f"K={k}" for k in SIZES)], rows)
    seeds = list(whole["seeds"].values())
    sizes, rows = seeds[0]["sizes"], []
    for ratio in RATIOS:
        each = [seed["ratios"][ratio] for seed in seeds]
        for i, size in enumerate(sizes):
            distance, bias, spread, ess = (
                over_seeds([e[key][i] for e in each]) for key in ("bias", "right_bias", "right_spread", "ess")
            )
            rows.append([ratio, size, distance, bias.signed, spread, ess])
        rows.append([ratio, "infinite", over_seeds([e["limit_bias"] for e in each]), "", "", ""])
    text += (
        f"\nTiny model ({len(seeds)} seeds): total variation distance of the expected weights from the true "
    )
    text += "posterior; bias and spread of the weight that the thought without a slip gets; effective sample size:\n\n"
    return text + table(["ratio", "K", "distance", "bias", "spread", "ESS"], rows)


def plot(whole: dict[str, Any], path: Path) -> None:
    seeds = list(whole["seeds"].values())
    sizes = seeds[0]["sizes"]
    with figure(path, 2) as (left, right):
        for colour, ratio in zip(COLOURS, RATIOS, strict=False):
            toy = whole["exact"]["medium"][ratio]
            left.plot(
                [e["bias"] for e in toy], [e["spread"] for e in toy], "o-", ms=3, color=colour, label=ratio
            )
            each = [seed["ratios"][ratio] for seed in seeds]
            by_size = [[e["bias"][i] for e in each] for i in range(len(sizes))]
            line(right, sizes, by_size, label=ratio, colour=colour)
        left.set(xlabel="bias / |grad log P|", ylabel="spread", title='toy "medium", K = 1, 2, 4')
        left.legend(fontsize=7)
        right.set(title="tiny model")
        sizes_axis(right, sizes, xlabel="K", ylabel="distance from P(z|x,Y)")
