"""Answers that a scorer of reasoning-gym would run as a program.

Some of its scorers hand an answer to `eval`, others to sympy's `parse_expr`, which is `eval` behind a few rewritings:
`__import__("os").system(...)` is then executed with the rights of whoever evaluates. Let through is what those scorers
are meant to read: values for the one, formulas for the other.
"""

from __future__ import annotations

import ast
import re

EVALUATED = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Datasets whose scorers `eval` an answer, as a list that means the same as the text asked for."""
PARSED = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Datasets whose scorers give it to sympy."""

UNREADABLE = "("
"""To `eval` and sympy alike."""

_VALUES = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict),
    *(ast.Name, ast.Load, ast.UnaryOp, ast.UAdd, ast.USub),
)
# No quotes, brackets or colons, and no attributes: numbers, names, operators and calls remain, of the names below.
_FORMULA = re.compile(r"[A-Za-z0-9\s+\-*/^().,!]*", re.ASCII)
_ATTRIBUTE = re.compile(r"\.\s*[A-Za-z]")
_NAME = re.compile(r"(?<![A-Za-z0-9])[A-Za-z][A-Za-z0-9]*")
_TRIGONOMETRIC = [
    f"{a}{name}{h}"
    for a in ("", "a")
    for name in ("sin", "cos", "tan", "sec", "csc", "cot")
    for h in ("", "h")
]
_FUNCTIONS = frozenset({"exp", "log", "ln", "sqrt", "cbrt", "Abs", "abs", "erf", "pi", *_TRIGONOMETRIC})


def is_program(answer: str, dataset: str, oracle: str) -> bool:
    """Whether the scorer of `dataset` would execute more of `answer` than a value or a formula.

    A formula's names are those of elementary functions, single letters, and whatever `oracle`, the dataset's own
    answer, names. What neither `eval` nor sympy can read is no program.
    """
    if dataset in EVALUATED:
        try:
            tree = ast.parse(answer, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # as `eval` will say, too
            return False
        return not all(isinstance(node, _VALUES) for node in ast.walk(tree))
    if dataset in PARSED:
        return not _is_formula(answer, _FUNCTIONS.union(_NAME.findall(oracle)))
    return False


def _is_formula(answer: str, names: frozenset[str]) -> bool:
    if not _FORMULA.fullmatch(answer) or _ATTRIBUTE.search(answer):
        return False
    return all(len(name) == 1 or name in names for name in _NAME.findall(answer))
