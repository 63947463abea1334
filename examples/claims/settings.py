"""A claim's TOML: a recipe of `megavar run` with one more table, [claim]."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from task import Task

from megavar.config.load import load_recipe
from megavar.config.recipe import Recipe
from megavar.errors import UserError
from megavar.files import write_atomically

HERE = Path(__file__).resolve().parent
_SHARED = ("model", "templates", "trainer", "initial", "posterior", "rollout")
"""Sections on which the phases depend that claims share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One claim as asked for."""

    path: Path
    kind: str
    """Which module measures it."""
    seeds: tuple[int, ...]
    floor: float
    """Held-out accuracy of the initial policy below which a seed is passed over: no arm could show anything."""
    task: Task
    claim: dict[str, Any]
    """The other keys of [claim]."""
    recipe: dict[str, Any]
    """All but [claim], as data."""

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def shared(self) -> str:
        """Claims with the same value share models, questions and traces of a seed."""
        parts = {"task": repr(self.task), **{name: self.recipe.get(name) for name in _SHARED}}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def digest(self) -> str:
        """Of all that a seed's results depend on."""
        parts = [self.kind, repr(self.task), self.claim, self.recipe]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def recipe_of(self, seed: int, directory: Path) -> Recipe:
        """The recipe of one replicate, whose models, data order and samples all come from its seed.

        directory: of the replicate; `inputs/` in it holds what `task.prepare` wrote.
        """
        inputs = directory / "inputs"
        files = {"train": "train", "eval": "held_out"}
        own = {
            "out": str(directory / "run"),
            "model": {"path": str(inputs / "model")},
            "data": {k: {"kind": "jsonl", "path": str(inputs / f"{v}.jsonl")} for k, v in files.items()},
            "trainer": {"seed": 1000 + seed},
            "rollout": {"seed": seed},
            "evaluate": {"seed": 10_000 + seed},
        }
        path = directory / f"{self.name}.toml"
        write_atomically(path, tomli_w.dumps(_merged(self.recipe, own)))
        return load_recipe(path)


def load_settings(path: Path) -> Settings:
    """Raises UserError for a file that is no claim's."""
    whole = _read(path)
    claim = whole.pop("claim", {})
    try:
        kind, seeds, floor, task = (claim.pop(key) for key in ("kind", "seeds", "floor", "task"))
        made = Task(**{**task, "slips": tuple(task["slips"])})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: [claim] needs kind, seeds, floor and task as in base.toml ({error})"
        ) from None
    return Settings(
        path=path, kind=kind, seeds=tuple(seeds), floor=floor, task=made, claim=claim, recipe=whole
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    base = own.pop("base", None)
    return _merged(_read(path.parent / base), own) if base else own


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables key by key; everything else is replaced."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(found.get(key), dict) and isinstance(value, dict)
        found[key] = _merged(found[key], value) if both else value
    return found
