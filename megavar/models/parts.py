"""Files of a long conversion, one after the other, that survive a kill: whole ones are kept, the torn one is redone.

<directory>/<part>                 written under another name, synced, then renamed
<directory>/.conversion.json       what conversion this is, and SHA-256 and notes of every whole part
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megavar.files import sha256, write_atomically

_PROGRESS = ".conversion.json"


class Part(NamedTuple):
    sha256: str
    notes: Any
    """JSON: what the writer of the part returned."""


class Parts:
    """The parts in one directory, made where missing; parts of another conversion are removed."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """identity: JSON-serialisable; all that must be the same for written parts to be kept."""
        self._path, self._identity = directory, json.loads(json.dumps(identity))
        self._parts: dict[str, Part] = {}
        self.kept: list[str] = []
        """Names of parts that were found whole."""
        progress = self._read()
        if progress is None:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            self._record()
            return
        for name, (digest, notes) in progress.items():
            if (directory / name).is_file() and sha256(directory / name) == digest:
                self._parts[name] = Part(digest, notes)
                self.kept.append(name)
        for path in directory.iterdir():
            if path.name not in self._parts and path.name != _PROGRESS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def add(self, name: str, write: Callable[[Stream], Any]) -> Part:
        """The part `name`, by `write` into a new file unless it is there. Raises OSError."""
        if name not in self._parts:
            torn = self._path / f".{name}.torn"
            with torn.open("wb") as file:
                stream = Stream(file)
                notes = json.loads(json.dumps(write(stream)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(torn, self._path / name)
            self._parts[name] = Part(stream.sha256, notes)
            self._record()
        return self._parts[name]

    @staticmethod
    def forget(directory: Path) -> None:
        """All parts are there; how they came about is no part of the result."""
        (directory / _PROGRESS).unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        try:
            progress = json.loads((self._path / _PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return progress["parts"] if progress["identity"] == self._identity else None

    def _record(self) -> None:
        progress = {"identity": self._identity, "parts": self._parts}
        write_atomically(self._path / _PROGRESS, json.dumps(progress, indent=1) + "\n")


class Stream:
    """Written from the first byte to the last; keeps nothing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._at = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """data: bytes, or anything with a buffer of bytes."""
        self._hash.update(data)
        size = memoryview(data).nbytes
        self._file.write(data)
        self._at += size
        return size

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
