"""Multiple choice: the letter an answer settles on."""

from __future__ import annotations

import re

from megavar.data.records import Question

# Most binding first; within a pattern the last match counts, since a text settles at its end. Possessive quantifiers,
# none of which runs over lines, keep a search linear: a model that repeats itself writes blanks by the thousand.
PATTERNS = (
    re.compile(
        r"\\boxed\{\s*+(?:\\(?:text|textbf|mathrm|mathbf)\{)?\s*+[\(\[]?\s*+([A-Z])\s*+[\)\]]?\s*+\.?\s*+\}"
    ),
    re.compile(
        r"(?i:\b(?:answer|choice|option)\b(?:\s++is)?)\s*+[:=]?\s*+(?i:option\s++|choice\s++)?\**+"
        r"[\(\[]?\s*+([A-Z])(?![A-Za-z])"
    ),
    re.compile(r"^[^\w\n]*+([A-Z])[^\w\n]*+$", re.MULTILINE),
    re.compile(r"^[^\S\n]*+[\(\[]?([A-Z])[\)\].:](?:\s|$)", re.MULTILINE),
    re.compile(r"\(([A-Z])\)"),
)


def verify(answer: str, question: Question) -> float:
    """1 where the answer settles on the reference letter; 0 for another letter or none.

    `payload["choices"]`, where given, is the list of options and bounds the letters that count.
    Raises ValueError where the reference answer names no letter.
    """
    choices = len(question.payload.get("choices", ())) or 26
    wanted = settled(question.answer, 26)
    if wanted is None:
        raise ValueError(
            f"question {question.id!r}: the reference answer {question.answer!r} names no choice"
        )
    return float(settled(answer, choices) == wanted)


def settled(text: str, choices: int) -> str | None:
    """The capital letter, among the first `choices`, that `text` settles on; None if it names none."""
    allowed = {chr(ord("A") + place) for place in range(choices)}
    for pattern in PATTERNS:
        letters = [letter for letter in pattern.findall(text) if letter in allowed]
        if letters:
            return letters[-1]
    return None
