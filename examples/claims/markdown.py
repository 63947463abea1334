"""Tables of results in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intervals import over_seeds, paired
from task import LETTERS


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def arms_table(seeds: Mapping[str, Any], names: Sequence[str], *, reference: str) -> str:
    """Accuracy of each arm, overall and by letter, its difference to the reference arm of the same seed."""
    rows = []
    for name in names:
        values = [seed["arms"][name]["accuracy"] for seed in seeds.values()]
        against = [seed["arms"][reference]["accuracy"] for seed in seeds.values()]
        letters = [
            over_seeds([seed["arms"][name]["by"][letter] for seed in seeds.values()]) for letter in LETTERS
        ]
        difference = "" if name == reference else paired(values, against).signed
        rows.append([name, over_seeds(values), *(f"{v.mean:.2f}" for v in letters), difference])
    seed, first = next(iter(seeds.items()))
    initial = [seed["initial"]["accuracy"] for seed in seeds.values()]
    by = [over_seeds([seed["initial"]["by"][letter] for seed in seeds.values()]).mean for letter in LETTERS]
    rows.insert(0, ["(initial policy)", over_seeds(initial), *(f"{v:.2f}" for v in by), ""])
    tokens = {first["arms"][name]["sampled_tokens"] for name in names}
    steps = {first["arms"][name]["steps"] for name in names}
    spent = f"{min(tokens)}" if len(tokens) == 1 else f"{min(tokens)} to {max(tokens)}"
    text = table(["arm", "accuracy", *LETTERS, f"against {reference}"], rows)
    return (
        text
        + f"\n{len(seeds)} seeds, {', '.join(map(str, sorted(steps)))} steps per arm, {spent} sampled tokens "
        f"per arm (seed {seed}).\n"
    )


def check_equal(arms: Mapping[str, Mapping[str, Any]], *, slice_tokens: float) -> None:
    """Every arm takes as many gradient steps and as many sampled tokens; the latter within one trace per question.

    Raises AssertionError.
    """
    steps = {arm["steps"] for arm in arms.values()}
    assert len(steps) == 1, f"arms differ in gradient steps: {steps}"
    tokens = [arm["sampled_tokens"] for arm in arms.values()]
    assert max(tokens) - min(tokens) <= slice_tokens, f"arms differ in sampled tokens: {tokens}"
