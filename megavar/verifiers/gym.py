"""reasoning-gym: its datasets by name and its own scorers.

A scorer needs the very entry its dataset made. Entries hold tuples and dictionaries with integer keys, which
JSON would turn into lists and strings (and some scorers then grade wrongly), so a payload stores them tagged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from megavar.data.records import Question
from megavar.verifiers.gym_answers import UNREADABLE, is_program

TUPLE, DICT = "__tuple__", "__dict__"


def dataset_names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def option_names(name: str) -> list[str]:
    """What `options` of dataset `name` may hold."""
    from reasoning_gym.factory import DATASETS

    return [
        field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")
    ]


def dataset(name: str, options: Mapping[str, Any]) -> Any:
    """The `ProceduralDataset` of that name and those options (JSON values), made once per process."""
    return _dataset(name, json.dumps(options, sort_keys=True))


@functools.lru_cache(maxsize=256)
def _dataset(name: str, options_json: str) -> Any:
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    options = json.loads(options_json)
    if name == "composite":
        options["datasets"] = [DatasetSpec(**spec) for spec in options.get("datasets", [])]
    return reasoning_gym.create_dataset(name, **options)


def payload(name: str, options: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Payload of a question made from `entry`; JSON-serialisable, and lossless for what scorers see."""
    return {"dataset": name, "options": dict(options), "entry": _tag(entry)}


def verify(answer: str, question: Question) -> float:
    """The dataset's own `score_answer`, surrounding white space removed; partial credit is passed on.

    An answer that its scorer would run as a program (see `gym_answers`) gets what one that cannot be read gets. A
    scorer that raises on an answer it cannot read, while it can read its own oracle, has called it wrong: 0. Raises
    ValueError for a score outside [0, 1], and whatever a scorer raises on a payload it cannot use.
    """
    payload = question.payload
    scorer, entry = dataset(payload["dataset"], payload["options"]), _untag(payload["entry"])
    answer = answer.strip()
    # One of a composite names the dataset whose scorer it is.
    grader = entry["metadata"].get("source_dataset", payload["dataset"])
    if is_program(answer, grader, entry["answer"] or ""):
        answer = UNREADABLE
    try:
        score = float(scorer.score_answer(answer, entry))
    except Exception:  # third-party scorers raise anything, from ValueError to sympy's own errors
        if entry["answer"] is None:
            raise
        scorer.score_answer(entry["answer"], entry)
        return 0.0
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"reasoning_gym {payload['dataset']!r} gave the score {score}, outside [0, 1]")
    return score


def _tag(value: Any) -> Any:
    if isinstance(value, tuple):
        return {TUPLE: [_tag(item) for item in value]}
    if isinstance(value, list):
        return [_tag(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in (TUPLE, DICT) for key in value):
            return {key: _tag(item) for key, item in value.items()}
        return {DICT: [[_tag(key), _tag(item)] for key, item in value.items()]}
    return value


def _untag(value: Any) -> Any:
    if isinstance(value, list):
        return [_untag(item) for item in value]
    if isinstance(value, Mapping):
        if TUPLE in value:
            return tuple(_untag(item) for item in value[TUPLE])
        if DICT in value:
            return {_untag(key): _untag(item) for key, item in value[DICT]}
        return {key: _untag(item) for key, item in value.items()}
    return value
