"""What a user sees of a run: one line per phase, kept up to date in place on a terminal.

Elsewhere (a log file, a batch job) plain lines: one when a phase is finished, and before that at most one
every PLAIN_SECONDS.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status
from rich.text import Text

PLAIN_SECONDS = 30.0
REFRESH_SECONDS = 0.1


class Task:
    """One phase under way. `advance` is cheap enough for every step."""

    def __init__(self, name: str, total: int | None, unit: str, done: int):
        self.name = name
        self.total = total
        self.unit = unit
        self.done = done
        self._resumed_at = done
        self._shown: dict[str, float | int | str] = {}
        self._started = time.monotonic()
        self._printed = self._started
        self._console: Console | None = None
        self._status: Status | None = None

    def advance(self, count: int = 1, **shown: float | int | str) -> None:
        """`count` more units are done; `shown` values (loss=0.31) stand at the end of the line."""
        self.done += count
        self._shown.update(shown)
        now = time.monotonic()
        if self._console is None:
            return
        if self._status is not None and now - self._printed >= REFRESH_SECONDS:
            self._status.update(Text(self.line(eta=True)))
            self._printed = now
        elif self._status is None and now - self._printed >= PLAIN_SECONDS:
            self._console.print(Text(self.line(eta=True)), soft_wrap=True)
            self._printed = now

    def line(self, *, eta: bool = False, note: str = "") -> str:
        """The phase in one line: name, units, seconds, time to go, values."""
        seconds = time.monotonic() - self._started
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.name:<24}"]
        if self.total is not None or self.done:
            parts.append(f"{self.done}{of} {self.unit}")
        parts.append(duration(seconds))
        fresh = self.done - self._resumed_at
        if eta and self.total is not None and fresh > 0:
            parts.append(f"{duration(seconds / fresh * max(0, self.total - self.done))} to go")
        parts += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._shown.items()]
        return "  ".join(parts + [note] if note else parts)


class Progress:
    """Prints the phases of a run to stderr; with `enabled=False` (every rank but one) prints nothing."""

    def __init__(self, *, enabled: bool = True, console: Console | None = None):
        self._console = (console or Console(stderr=True, highlight=False)) if enabled else None

    @contextmanager
    def phase(
        self, name: str, total: int | None = None, unit: str = "steps", done: int = 0
    ) -> Iterator[Task]:
        """Show a phase while the block runs. `done` units were finished by an earlier, interrupted run."""
        task = Task(name, total, unit, done)
        console = task._console = self._console
        if console is not None and console.is_terminal:
            task._status = console.status(Text(task.line()))
            task._status.start()
        note = "stopped"
        try:
            yield task
            note = ""
        finally:
            if task._status is not None:
                task._status.stop()
            if console is not None:
                console.print(Text(task.line(note=note)), soft_wrap=True)

    def already(self, name: str, seconds: float) -> None:
        """Say that a phase was finished by an earlier run, in `seconds`."""
        if self._console is not None:
            self._console.print(Text(f"{name:<24}  finished earlier in {duration(seconds)}"), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8.3 s, 4 min 10 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
