"""How much memory a piece of work needs at most, and that it needs no more. Linux counts it; elsewhere it is 0."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

_PROCESS = Path("/proc/self")
_M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""


def return_large_blocks(size: int = 1 << 20) -> None:
    """Have blocks of `size` bytes and more go back to the system as soon as they are freed, for the whole process.

    glibc otherwise keeps blocks of up to 32 MiB in a heap, where a few tensors' worth of holes collect.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size)


def restart_peak() -> None:
    """The process's peak begins anew, see proc(5). A container may forbid it; then what came before counts as well."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def resident(name: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of resident memory, now or at the peak: buffers of torch and mapped files too."""
    status = _PROCESS / "status"
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


class PeakMemory:
    """A `with` block's highest resident memory above what was resident at its start, in `bytes` afterwards."""

    bytes: int = 0

    def __enter__(self) -> Self:
        restart_peak()
        self._before = resident("VmHWM")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = resident("VmHWM") - self._before
