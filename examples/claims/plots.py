"""Plots as small SVG files, the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from intervals import over_seeds

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
"""Okabe and Ito's, which stay apart for colour-blind readers."""


@contextmanager
def figure(path: Path, columns: int = 1, *, width: float = 4.2, height: float = 2.9) -> Iterator[list[Any]]:
    """Axes in a row; saved when the block ends."""
    settings: dict[Any, Any] = {"svg.hashsalt": "megavar", "svg.fonttype": "none", "font.size": 8.5, "axes.grid": True,
                "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with pyplot.rc_context(settings):
        drawn, axes = pyplot.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
        try:
            yield list(axes[0])
            drawn.tight_layout()
            drawn.savefig(path, metadata={"Date": None})
        finally:
            pyplot.close(drawn)


def line(
    axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], *, label: str, colour: str, **style: Any
) -> None:
    """Means with intervals: values[i] are the seeds' at x[i]."""
    found = [over_seeds(v) for v in values]
    axis.errorbar(
        x,
        [v.mean for v in found],
        yerr=[v.half for v in found],
        label=label,
        color=colour,
        capsize=2,
        lw=1.2,
        marker="o",
        ms=3,
        **style,
    )


def sizes_axis(axis: Any, sizes: Sequence[int], **labels: str) -> None:
    """A logarithmic axis with a tick at each size."""
    axis.set(xscale="log", **labels)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


def bars(
    axis: Any, names: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], *, ylabel: str
) -> None:
    """One cluster of bars per name, one bar per group; groups[g][i] are the seeds' values of names[i]."""
    share = 0.8 / len(groups)
    for place, (group, values) in enumerate(groups.items()):
        found = [over_seeds(v) for v in values]
        x = [i - 0.4 + share * (place + 0.5) for i in range(len(names))]
        axis.bar(
            x,
            [v.mean for v in found],
            share,
            yerr=[v.half for v in found],
            label=group,
            color=COLOURS[place % len(COLOURS)],
            error_kw={"lw": 0.8, "capsize": 1.5},
        )
    axis.axhline(0, color="k", lw=0.6)
    axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axis.set_ylabel(ylabel)
