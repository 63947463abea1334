"""Equal text up to white space, or equal numbers."""

from __future__ import annotations

import re
from fractions import Fraction

from megavar.data.records import Question

# Four digits of exponent: enough for any answer, and comparing stays cheap whatever a model writes.
NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,4000})?(\.\d{0,4000})?([eE][+-]?\d{1,4})?")


def verify(answer: str, question: Question) -> float:
    """1 where the texts agree after white space is collapsed, or both are numbers of the same value.

    A number is an optional sign, digits with or without thousands commas, an optional fraction part and
    exponent, or a quotient of two of these: "1,000.50", "-3e2", "3/4".
    """
    given, wanted = (" ".join(text.split()) for text in (answer, question.answer))
    if given == wanted:
        return 1.0
    value = number(given)
    return float(value is not None and value == number(wanted))


def number(text: str) -> Fraction | None:
    """The exact value of a number or quotient, None for any other text."""
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not all(NUMBER.fullmatch(part) and re.search(r"^[^eE]*\d", part) for part in parts):
        return None
    values = [Fraction(part.replace(",", "")) for part in parts]
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None
