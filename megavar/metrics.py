"""Metrics of a run: one JSON object per line of `<run>/metrics.jsonl`. docs/metrics.md has every name.

Each line has `time` (seconds since the epoch), `phase`, `step` and values named `<group>/<name>`, where the
group is one of GROUPS. A fit's optimizer steps count from 1; step 0 is of a phase as a whole, at its end. A step of a
phase is in the file once, also after a kill and a resumption: what a resumed phase does again takes the place of what
it had written. Trackers (`megavar.tracking`) are shown the same lines.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megavar.errors import UserError

GROUPS = ("train", "rollout", "eval", "perf", "vr")


class Tracker(Protocol):
    """Another place that shows the metrics. It is shown the lines of each phase that the run passes, in order, in every
    process once: those of earlier processes that stand, then new ones."""

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of the file."""

    def close(self) -> None:
        """Everything that was shown must be safe on return."""


class Metrics:
    """The metrics file of a run, appended to by one rank; with `writer=False` every call does nothing."""

    def __init__(self, path: Path, *, writer: bool = True, trackers: Sequence[Tracker] = ()):
        self.path = path
        self._descriptor: int | None = None
        self._trackers = trackers
        self._newest: dict[str, int] = {}  # phase -> its last step in the file
        self._ended: set[str] = set()  # phases with a step 0, the last that they log
        self._unshown: dict[str, list[str]] = {}  # phase -> lines of earlier processes
        if writer:
            cut_torn_line(path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._look()

    def log(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line. Values are numbers, text, or lists of numbers; infinities and NaN become the strings that
        `float()` reads: JSON has none.

        Raises ValueError for a name outside GROUPS.
        """
        if self._descriptor is None:
            return
        line: dict[str, Any] = {"time": round(time.time(), 3), "phase": phase, "step": step}
        for name, value in values.items():
            if name.split("/", 1)[0] not in GROUPS or "/" not in name:
                raise ValueError(f"metric {name!r} is not under {', '.join(f'{g}/' for g in GROUPS)}")
            not_json = isinstance(value, float) and not math.isfinite(value)
            line[name] = str(float(value)) if not_json else value
        # One write of a whole line: a kill leaves at most one torn line, at the end.
        os.write(self._descriptor, (json.dumps(line) + "\n").encode())
        self._note(phase, step)
        for tracker in self._trackers:
            tracker.log(line)

    def rewind(self, phase: str, step: int = -1) -> None:
        """Forget the lines of `phase` after `step`, and its step 0; call it when the phase starts from there again."""
        if self._descriptor is None:
            return
        if self._newest.get(phase, -1) > step or phase in self._ended:
            self._remove(phase, step)
        for text in self._unshown.pop(phase, ()):
            line = json.loads(text)
            if 0 < line["step"] <= step:
                self._show(line)

    def passed(self, phase: str, values: Mapping[str, Any]) -> None:
        """The phase was finished by an earlier process. Its `values` are logged where a kill came before that."""
        if self._descriptor is None:
            return
        for text in self._unshown.pop(phase, ()):
            self._show(json.loads(text))
        if phase not in self._ended:
            self.log(phase, 0, values)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            for tracker in self._trackers:
                tracker.close()

    def _show(self, line: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(line)

    def _look(self) -> None:
        for text, line in _lines(self.path):
            self._note(line["phase"], line["step"])
            if self._trackers:
                self._unshown.setdefault(line["phase"], []).append(text)

    def _note(self, phase: str, step: int) -> None:
        self._newest[phase] = max(step, self._newest.get(phase, -1))
        if step == 0:
            self._ended.add(phase)

    def _remove(self, phase: str, step: int) -> None:
        assert self._descriptor is not None
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._newest.pop(phase)
        self._ended.discard(phase)
        with open(temporary, "w", encoding="utf-8") as new:
            for text, line in _lines(self.path):
                if line["phase"] != phase or 0 < line["step"] <= step:
                    new.write(text)
                    self._note(line["phase"], line["step"])
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file in order; a last line that is still being written is left out."""
    for _, line in _lines(path):
        yield line


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                return
            try:
                line = json.loads(text)
            except ValueError as error:
                raise UserError(f"{path}:{number}: damaged ({error}); remove the line") from None
            yield text, line


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last line break, which a kill left behind."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            at = file.read(keep - start).rfind(b"\n")
            if at >= 0:
                keep = start + at + 1
                break
            keep = start
        if keep != end:
            file.truncate(keep)
