"""Files that survive a kill at any instant: atomic replacement, locks that die with their holder; and their digests."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from megavar.errors import UserError

GRACE_SECONDS = 10.0
"""A killed run's processes need a moment to go; a lock that stays held longer is in use."""


_READERS = 8
"""Files read at once: one thread hashes slower than a disk reads."""


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(paths: Iterable[Path]) -> list[str]:
    """Those of several files, read at once."""
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(sha256, paths))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a machine that loses power, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class FileLock:
    """An exclusive `flock`; the kernel drops it with the process."""

    def __init__(self, descriptor: int):
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, *, busy: str) -> Self:
        """Take the lock, waiting GRACE_SECONDS at most; `busy` begins the UserError if somebody keeps it.

        Raises OSError where the file cannot be made or the file system has no locks.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    os.close(descriptor)
                    raise UserError(f"{busy} ({holder}); wait for it or stop it") from None
                time.sleep(0.05)
            except OSError:
                os.close(descriptor)
                raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        """Drop the lock. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
