"""Policy and posterior on engines: one engine each, or one engine that swaps between two sets of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megavar.rollout.engine import Engine

SampledRole = Literal["policy", "posterior"]


class RoleEngines:
    """Hands out the engine of a role with that role's weights in it.

    Swapping costs one weight update whenever the role changes, so callers group their work by role.
    """

    def __init__(self, engines: Mapping[SampledRole, Engine]) -> None:
        """engines: the same object under both roles makes it swap."""
        self._engines = dict(engines)
        self._weights: dict[SampledRole, tuple[Path, str]] = {}
        self._loaded: dict[int, tuple[Path, str]] = {}

    def set_weights(self, role: SampledRole, hf_directory: Path, version: str) -> None:
        """The weights that `engine(role)` will have; nothing is loaded yet."""
        self._weights[role] = (Path(hf_directory), version)

    def engine(self, role: SampledRole) -> Engine:
        """Raises KeyError for a role that has no engine or no weights yet."""
        engine, wanted = self._engines[role], self._weights[role]
        if self._loaded.get(id(engine)) != wanted:
            self._loaded.pop(id(engine), None)  # unknown, should the update fail half-way
            engine.update_weights(*wanted)
            self._loaded[id(engine)] = wanted
        return engine

    def close(self) -> None:
        """Close every engine. Idempotent, as their `close` is."""
        for engine in self._engines.values():
            engine.close()
