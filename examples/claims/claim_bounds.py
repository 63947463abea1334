"""Claim 1: L_K rises with K and stays below log P (Eq. 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from enumeration import enumerated
from intervals import over_seeds
from markdown import table
from plots import COLOURS, figure, line, sizes_axis
from replicate import Replicate
from task import LETTERS
from toys import THOUGHTS, toys, tuples, weigh_tuples

EXACT = (1, 2, 3, 4, 5)
ROUNDING = 1e-4
"""Nats by which float32 log-probs may move a sum over a trace."""


def exact() -> dict[str, Any]:
    """L_1 .. L_5 and log P of the toy questions, summed over every K-tuple of thoughts."""
    found = {}
    for toy in toys():
        bounds = []
        for size in EXACT:
            index = tuples(THOUGHTS, size)
            probability = toy.log_q.detach()[index].sum(dim=1).exp()
            last = weigh_tuples(toy, index).bounds.view(-1, size)[:, -1]
            bounds.append(float((probability * last).sum()))
        found[toy.name] = {"bounds": bounds, "log_p": float(toy.log_evidence.detach())}
    return found


def measure(replicate: Replicate) -> dict[str, Any]:
    """log P by enumeration, L_K by draws from the enumerated q, for each question of the sample."""
    sizes, draws = replicate.claim["sizes"], replicate.claim["draws"]
    questions = []
    for one in enumerated(replicate, replicate.claim["per_letter"]):
        index = one.draws(max(draws // max(sizes), 2), max(sizes), replicate.seed)
        bounds, errors = [], []
        for size in sizes:
            # Groups of the same draws: every K takes as many.
            groups = one.weigh(index.reshape(-1, size), "full")
            values = groups.bounds.view(-1, size)[:, -1].numpy()
            bounds.append(float(values.mean()))
            errors.append(float(values.std(ddof=1) / np.sqrt(len(values))))
        q, rho = np.exp(one.log_q), one.log_pi + one.log_c - one.log_q
        questions.append(
            {
                "question": one.question,
                "log_p": one.log_evidence,
                "elbo": float((q * rho).sum()),
                "bounds": bounds,
                "standard_errors": errors,
            }
        )
    return {"sizes": sizes, "questions": questions}


def gaps(seed: dict[str, Any], letters: str = LETTERS) -> list[float]:
    """Mean of log P - L_K over the questions, for each K."""
    taken = [q for q in seed["questions"] if q["question"][0] in letters]
    return [float(np.mean([q["log_p"] - q["bounds"][i] for q in taken])) for i in range(len(seed["sizes"]))]


def tables(whole: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{b:.4f}" for b in toy["bounds"]), f"{toy['log_p']:.4f}"]
        for name, toy in whole["exact"].items()
    ]
    text = "Exact, on the enumerable questions of `tests/objectives`:\n\n"
    text += table(["question", *(f"L_{k}" for k in EXACT), "log P"], rows)
    seeds = list(whole["seeds"].values())
    sizes = seeds[0]["sizes"]
    rows = []
    for letters in (LETTERS, *LETTERS):
        values = [gaps(seed, letters) for seed in seeds]
        log_p = [
            float(np.mean([q["log_p"] for q in s["questions"] if q["question"][0] in letters])) for s in seeds
        ]
        cells = [over_seeds([v[i] for v in values]) for i in range(len(sizes))]
        rows.append(["all" if len(letters) > 1 else letters, over_seeds(log_p), *cells])
    text += f"\nTiny model, gap log P - L_K in nats ({len(seeds)} seeds, log P by enumeration):\n\n"
    text += table(["letter", "log P", *(f"K={k}" for k in sizes)], rows)
    above, falls, count = violations(seeds)
    return text + (
        f"\nOf {count} estimates of single questions {above} lie above log P and {falls} below the L_K of half the K, "
        "by more than three standard errors.\n"
    )


def violations(seeds: list[dict[str, Any]]) -> tuple[int, int, int]:
    """Estimates above log P, estimates below their predecessor, and how many there are."""
    above = falls = count = 0
    for question in (q for seed in seeds for q in seed["questions"]):
        bounds = question["bounds"]
        for place, (bound, error) in enumerate(zip(bounds, question["standard_errors"], strict=True)):
            count += 1
            above += bound > question["log_p"] + 3 * error + ROUNDING
            falls += place > 0 and bound < bounds[place - 1] - 3 * error - ROUNDING
    return above, falls, count


def plot(whole: dict[str, Any], path: Path) -> None:
    seeds = list(whole["seeds"].values())
    sizes = seeds[0]["sizes"]
    with figure(path, 2) as (left, right):
        for colour, (name, toy) in zip(COLOURS, whole["exact"].items(), strict=False):
            left.plot(
                EXACT, [toy["log_p"] - b for b in toy["bounds"]], marker="o", ms=3, color=colour, label=name
            )
        left.set(xlabel="K", ylabel="log P - L_K, nats", title="enumerable questions, exact", yscale="log")
        left.legend(fontsize=7)
        for colour, letter in zip(COLOURS, LETTERS, strict=False):
            values = [gaps(seed, letter) for seed in seeds]
            by_size = [[v[i] for v in values] for i in range(len(sizes))]
            line(right, sizes, by_size, label=f"letter {letter}", colour=colour)
        right.set(title="tiny model")
        sizes_axis(right, sizes, xlabel="K", ylabel="log P - L_K, nats")
        right.legend(fontsize=7)
