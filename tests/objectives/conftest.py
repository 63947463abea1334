"""The toy questions of `toy_space` as a fixture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test files of this folder share toy_space.py, which is in no package.
sys.path.insert(0, str(Path(__file__).parent))

from toy_space import Toy, make_toy  # noqa: E402


@pytest.fixture(params=["easy", "medium", "hard", "hopeless"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return {
        "easy": lambda: make_toy("easy", 1, (4,), 4.0),
        "medium": lambda: make_toy("medium", 2, (1, 5), 0.5),
        "hard": lambda: make_toy("hard", 3, (6, 5, 3), -3.0),
        "hopeless": lambda: make_toy("hopeless", 4, (5,), -5.0),
    }[request.param]()
