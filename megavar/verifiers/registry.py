"""Verifiers by name.

A verifier is a function `(answer, question) -> score` with the score in [0, 1]. Each lives in a module of its
own and is imported on first use, so that naming one costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from megavar.data.records import Question
from megavar.errors import UserError

Verifier = Callable[[str, Question], float]

_MODULES = {
    "exact": "megavar.verifiers.exact",
    "math": "megavar.verifiers.mathematics",
    "choice": "megavar.verifiers.choice",
    "reasoning_gym": "megavar.verifiers.gym",
}
NAMES = tuple(_MODULES)
ISOLATED = frozenset({"math", "reasoning_gym"})
"""These evaluate what a model wrote (sympy): they may hang or eat memory, and run in worker processes."""
PAYLOAD_KEYS = {"reasoning_gym": ("dataset", "options", "entry")}
"""Payload keys a verifier cannot do without."""


def load_verifier(name: str) -> Verifier:
    """The function behind `name`. Raises UserError for an unknown name."""
    if name not in _MODULES:
        raise UserError(f"unknown verifier {name!r}; known: {', '.join(NAMES)}")
    return importlib.import_module(_MODULES[name]).verify


def is_correct(score: float) -> bool:
    """Correct means full credit; partial credit (some reasoning-gym scorers give 0.01 for trying) is not
    correct."""
    return score >= 1.0
