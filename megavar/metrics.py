"""Metrics of a run: one JSON object per line of `<run>/metrics.jsonl`.

Each line has `time` (seconds since the epoch), `phase`, `step` and values named `<group>/<name>`, where the
group is one of GROUPS. A step of a phase is in the file once, also after a kill and a resumption.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

GROUPS = ("train", "rollout", "eval", "perf", "vr")


class Metrics:
    """The metrics file of a run, appended to by one rank; with `writer=False` every call does nothing."""

    def __init__(self, path: Path, *, writer: bool = True):
        self.path = path
        self._descriptor: int | None = None
        if writer:
            _cut_torn_line(path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def log(self, phase: str, step: int, values: Mapping[str, float | int | bool | str]) -> None:
        """Append one line. Infinities and NaN become the strings that `float()` reads: JSON has none.

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

    def rewind(self, phase: str, step: int = -1) -> None:
        """Forget the lines of `phase` after `step`; call it when the phase starts from that step again."""
        if self._descriptor is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(self.path, encoding="utf-8") as old, open(temporary, "w", encoding="utf-8") as new:
            for text in old:
                line = json.loads(text)
                if line["phase"] != phase or line["step"] <= step:
                    new.write(text)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        os.close(self._descriptor)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file in order; a last line that is still being written is left out."""
    with open(path, encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)


def _cut_torn_line(path: Path) -> None:
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
