"""Tables of results in markdown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    initial = [seed["initial"]["accuracy"] for seed in seeds.values()]
    by = [over_seeds([seed["initial"]["by"][letter] for seed in seeds.values()]).mean for letter in LETTERS]
    rows.insert(0, ["(initial policy)", over_seeds(initial), *(f"{v:.2f}" for v in by), ""])
    return table(["arm", "accuracy", *LETTERS, f"against {reference}"], rows) + _costs(list(seeds.values()))


def _costs(seeds: list[Any]) -> str:
    steps = {arm["steps"] for seed in seeds for arm in seed["arms"].values()}
    tokens = [[arm["sampled_tokens"] for arm in seed["arms"].values()] for seed in seeds]
    apart = max(1 - min(own) / max(own) for own in tokens)
    return (
        f"\n{len(seeds)} seeds, {', '.join(map(str, sorted(steps)))} steps and {min(map(min, tokens))} to "
        f"{max(map(max, tokens))} sampled tokens per arm; arms of a seed differ by up to {apart:.1%} of them.\n"
    )


def check_equal(
    arms: Mapping[str, Mapping[str, Any]], *, slice_tokens: float, may_break: Collection[str] = ()
) -> None:
    """Every arm takes as many gradient steps and as many sampled tokens; the latter within `slice_tokens`.

    may_break: arms that may have fewer tokens, since their models may forget how to go on. Raises AssertionError.
    """
    steps = {arm["steps"] for arm in arms.values()}
    assert len(steps) == 1, f"arms differ in gradient steps: {steps}"
    tokens = {name: arm["sampled_tokens"] for name, arm in arms.items()}
    least = min(count for name, count in tokens.items() if name not in may_break)
    assert max(tokens.values()) - least <= slice_tokens, f"arms differ in sampled tokens: {tokens}"
