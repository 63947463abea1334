"""What changed between two recipes, in words."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from typing import Any

NEUTRAL_KEYS = frozenset({"name", "out", "tracking"})
"""Keys and sections of the recipe's top level that change no result: they may differ between runs in one directory."""
NEUTRAL_LEAVES = frozenset(
    "checkpoint_every checkpoint_keep ranks tp pp vpp cp ep etp sequence_parallel recompute threads "
    "packing tokens_per_micro_batch scoring_tokens_per_micro_batch urls router_url".split()
)
"""Likewise, in whatever section they stand: a run may go on under another layout, which moves the last digits alone."""


def changes(old: str, new: str) -> list[str]:
    """`dotted.key: old -> new` for every key that differs and changes results. Both are TOML text."""
    before, after = (dict(_flatten(tomllib.loads(text))) for text in (old, new))
    return [
        f"{key}: {_show(before, key)} -> {_show(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _neutral(key)
    ]


def identity(text: str) -> str:
    """Digest of the keys that change results. TOML text."""
    kept = {key: value for key, value in _flatten(tomllib.loads(text)) if not _neutral(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _neutral(dotted: str) -> bool:
    return dotted.split(".", 1)[0] in NEUTRAL_KEYS or dotted.rsplit(".", 1)[-1] in NEUTRAL_LEAVES


def _flatten(value: Any, dotted: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not dotted):
        for key, element in value.items():
            yield from _flatten(element, f"{dotted}.{key}" if dotted else key)
    elif isinstance(value, list) and any(isinstance(element, dict) for element in value):
        for index, element in enumerate(value):
            yield from _flatten(element, f"{dotted}.{index}")
    else:
        yield dotted, value


def _show(flat: dict[str, Any], key: str) -> str:
    return json.dumps(flat[key], ensure_ascii=False, default=str) if key in flat else "(none)"
