"""The enumerable questions of the objectives' tests, from easy to hopeless, for the exact parts of two claims.

Imported from there, so that what is shown of the bound and the ratios is shown on the very space on which the tests
hold the package to exact sums.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "objectives"))

from toy_space import THOUGHTS, Toy, grad, make_toy, tuples, weigh_tuples  # noqa: E402

__all__ = ["THOUGHTS", "Toy", "grad", "toys", "tuples", "weigh_tuples"]


def toys() -> list[Toy]:
    return [
        make_toy("easy", 1, (4,), 4.0),
        make_toy("medium", 2, (1, 5), 0.5),
        make_toy("hard", 3, (6, 5, 3), -3.0),
        make_toy("hopeless", 4, (5,), -5.0),
    ]
