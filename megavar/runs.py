"""The run directory: what was asked, and which phases of it are finished.

    <run>/recipe.toml              the resolved recipe
    <run>/metrics.jsonl            see megavar.metrics
    <run>/table.json               the arms, when all are evaluated; gone when a phase of them is redone for a change
    <run>/<phase>/phase.json       written when the phase starts: hash of its config and inputs
    <run>/<phase>/manifest.json    written last, atomically: the phase is finished
    <run>/<phase>.stale-N          a phase whose config or inputs have changed since, moved aside

A phase's hash covers its config, and of its inputs their hashes and the contents of their files: a change redoes
that phase and what follows from it, and nothing else. A phase that is done again and comes out with the same bytes
(a lost part restored) redoes nothing behind it. Everything here is safe against a kill at any instant.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from megavar import __version__
from megavar.config.diff import NEUTRAL_LEAVES, changes
from megavar.config.load import dump_recipe, load_recipe
from megavar.config.recipe import Recipe
from megavar.errors import UserError
from megavar.files import FileLock, sha256_of, write_atomically

TABLE = "table.json"
SCHEMA = 2
"""Version of what phases store; raised when an older finished phase can no longer be read."""
PATIENCE_SECONDS = 1800.0
"""How long a rank waits for the writer to open what it is about to use."""

_PHASE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(/[A-Za-z0-9][A-Za-z0-9_.+-]*)*")
_STALE = re.compile(r"\.stale-\d+$")


@dataclass(frozen=True)
class Phase:
    """One step of a run with a directory of its own. Ranks other than the writer only read it."""

    name: str
    path: Path
    hash: str
    """Of the config, the inputs and SCHEMA."""
    inputs: Mapping[str, str]
    """Input phase -> digest of its hash and the contents of its files."""
    writer: bool
    started: float = field(default_factory=time.monotonic, compare=False)

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest if the phase is finished with this hash and every file of it still has its size."""
        return _finished(self.path, self.hash)

    @property
    def done(self) -> bool:
        """Finished and intact. Ranks agree on it from the return of `RunDirectory.phase` to `finish`."""
        return self.manifest is not None

    def finish(
        self, counts: Mapping[str, int], metrics: Mapping[str, Any], warnings: Sequence[str] = ()
    ) -> None:
        """Write the manifest; every file of the phase must be complete. Other ranks' calls do nothing.

        Let the ranks meet (a barrier) between this and the opening of a phase that has this one as input.
        """
        if not self.writer:
            return
        files = _files(self.path)
        manifest = {
            "phase": self.name,
            "hash": self.hash,
            "inputs": dict(self.inputs),
            "versions": _versions(),
            "counts": dict(counts),
            "metrics": dict(metrics),
            "warnings": list(warnings),
            # Of the process that finished the phase; what an earlier, killed one took is not in it.
            "seconds": round(time.monotonic() - self.started, 3),
            "finished": _now(),
            "files": {name: path.stat().st_size for name, path in files.items()},
            "content": _content(files),
        }
        write_atomically(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")


class RunDirectory:
    """A run directory, opened by one launcher and, within it, one writing rank and any number of readers."""

    def __init__(self, path: Path, recipe: Recipe, *, writer: bool, lock: FileLock | None):
        self.path = path
        self.recipe = recipe
        self.writer = writer
        self._lock = lock

    @classmethod
    def open(cls, recipe: Recipe, *, force: bool = False, writer: bool = True) -> Self:
        """Create or reopen `recipe.out` for this recipe; the launcher's call, before any rank starts.

        Once a phase has started, a recipe that differs from the stored one is refused with the differences,
        unless `force`: then the new one is stored, and the phases that the change touches are redone. With
        `writer=False` wait until another process has stored this recipe.

        Raises UserError: directory not writable, not a run directory, in use, or of another recipe.
        """
        path = recipe.out
        if not writer:
            _await(lambda: _stored_equals(path, recipe), f"{path}: the first rank did not store the recipe")
            return cls(path, recipe, writer=False, lock=None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock.acquire(path / ".launcher.lock", busy=f"{path}: another `megavar run` uses it")
            try:
                # Ranks of a launcher that was killed outlive it for a moment.
                FileLock.acquire(path / ".writer.lock", busy=f"{path}: a rank still runs in it").release()
                _store(path, recipe, force)
            except (UserError, OSError):
                lock.release()
                raise
        except OSError as error:
            raise UserError(f"{path}: cannot write to it: {error.strerror}; set --out") from None
        return cls(path, recipe, writer=True, lock=lock)

    @classmethod
    def attach(cls, path: Path, *, writer: bool) -> Self:
        """Enter a directory that a launcher opened; a rank's call. Exactly one rank is the writer."""
        recipe = load_recipe(path / "recipe.toml")
        lock = None
        if writer:
            lock = FileLock.acquire(path / ".writer.lock", busy=f"{path}: another run is writing to it")
        return cls(path, recipe, writer=writer, lock=lock)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def phase(self, name: str, *, config: Mapping[str, Any], inputs: Sequence[Phase] = ()) -> Phase:
        """Open the phase `name`, which may lie in a folder ("final/sft"). All ranks call it alike.

        config: JSON-serialisable; all that the phase's result depends on beside its inputs
        (`Recipe` sections through `model_dump(mode="json")`). inputs: finished phases.

        The writer moves a directory of another hash aside and creates it; the others wait for that. Files of
        an unfinished phase of the same hash stay, for the phase to go on from. Every rank may write files of
        its own into the directory; names that begin with a dot stay out of the manifest.
        """
        if not _PHASE_NAME.fullmatch(name) or _STALE.search(name):
            raise ValueError(f"{name!r} cannot be a phase name")
        used = {}
        for phase in inputs:
            if (manifest := phase.manifest) is None:
                raise ValueError(f"phase {name} needs {phase.name}, which is not finished")
            # Not of the whole manifest: times and speeds are in it.
            used[phase.name] = _sha256(f"{manifest['hash']} {manifest['content']}")
        described = {"schema": SCHEMA, "phase": name, "config": _results(config), "inputs": used}
        canonical = json.dumps(described, sort_keys=True, separators=(",", ":"))
        digest = _sha256(canonical)
        path = self.path / name
        started = path / "phase.json"
        if not self.writer:
            _await(lambda: _hash_of(started) == digest, f"{path}: the first rank did not open this phase")
        elif _hash_of(started) != digest:
            if path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                self._set_aside(path)
            path.mkdir(parents=True, exist_ok=True)
            content = {"hash": digest, "started": _now(), **described}
            write_atomically(started, json.dumps(content, indent=1) + "\n")
        return Phase(name=name, path=path, hash=digest, inputs=used, writer=self.writer)

    def phases(self) -> list[Path]:
        """Directories of the phases started so far, oldest first; stale ones are left out."""
        return sorted(
            (p.parent for p in self.path.rglob("phase.json") if not _is_stale(p.parent, self.path)),
            key=lambda p: (_read_json(p / "phase.json") or {}).get("started", ""),
        )

    def _set_aside(self, path: Path) -> None:
        number = 1
        while (stale := path.with_name(f"{path.name}.stale-{number}")).exists():
            number += 1
        path.rename(stale)
        (self.path / TABLE).unlink(missing_ok=True)
        was = stale.relative_to(self.path)
        print(f"{path.relative_to(self.path)}: config or inputs changed; kept as {was}", file=sys.stderr)


def phase_status(path: Path) -> tuple[str, dict[str, Any] | None]:
    """Status of a started phase's directory in words, and its manifest if it is finished."""
    manifest = _finished(path, _hash_of(path / "phase.json"))
    if manifest is not None:
        return "finished", manifest
    return "files are missing" if (path / "manifest.json").exists() else "not finished", None


def _finished(path: Path, digest: str | None) -> dict[str, Any] | None:
    stored = _read_json(path / "manifest.json")
    if stored is None or stored["hash"] != digest:
        return None
    intact = all(_size(path / name) == size for name, size in stored["files"].items())
    return stored if intact else None


def _store(path: Path, recipe: Recipe, force: bool) -> None:
    stored, text = path / "recipe.toml", dump_recipe(recipe)
    if not stored.exists():
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(f"{path}: neither empty nor a run directory (no recipe.toml); set --out")
    else:
        old = stored.read_text(encoding="utf-8")
        try:
            old = dump_recipe(load_recipe(stored))
        except UserError:
            pass  # Of another version: it cannot be loaded, but its keys can still be compared.
        differences = _changes(stored, old, text)
        if differences and not force and any(path.rglob("phase.json")):
            listing = "".join(f"\n  {line}" for line in differences)
            raise UserError(
                f"{path}: holds a run of another recipe (stored -> asked):{listing}\n"
                "choose another --out, or add --force to store this recipe and redo the phases it changes"
            )
        if old == text:
            return
    write_atomically(stored, text)


def _changes(stored: Path, old: str, new: str) -> list[str]:
    try:
        return changes(old, new)
    except ValueError as error:  # tomllib.TOMLDecodeError
        return [f"{stored} is not valid TOML: {error}"]


def _results(config: Any) -> Any:
    """The config without what changes no result."""
    if isinstance(config, Mapping):
        return {key: _results(value) for key, value in config.items() if key not in NEUTRAL_LEAVES}
    if isinstance(config, (list, tuple)):
        return [_results(value) for value in config]
    return config


def _stored_equals(path: Path, recipe: Recipe) -> bool:
    stored = path / "recipe.toml"
    return stored.exists() and stored.read_text(encoding="utf-8") == dump_recipe(recipe)


def _await(ready: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise UserError(f"{otherwise} within {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.02)


def _is_stale(path: Path, root: Path) -> bool:
    return any(_STALE.search(part) for part in path.relative_to(root).parts)


def _hash_of(path: Path) -> str | None:
    content = _read_json(path)
    return None if content is None else content["hash"]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove {path.parent} to redo the phase") from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _files(path: Path) -> dict[str, Path]:
    every = ((p.relative_to(path), p) for p in sorted(path.rglob("*")))
    # What lies in a hidden directory is hidden too.
    shown = ((name, p) for name, p in every if not any(part.startswith(".") for part in name.parts))
    files = {name.as_posix(): p for name, p in shown if p.is_file()}
    return {name: p for name, p in files.items() if name not in ("manifest.json", "phase.json")}


def _content(files: Mapping[str, Path]) -> str:
    """Digest of the files' names and bytes."""
    digests = dict(zip(files, sha256_of(files.values()), strict=True))
    return _sha256(json.dumps(digests, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"megavar": __version__}
    for name in ("torch", "transformers", "megatron-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
