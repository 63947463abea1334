"""Verify many answers at once, each result under the key of its item."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from megavar.data.records import Question
from megavar.verifiers.registry import ISOLATED, load_verifier, seconds_allowed
from megavar.verifiers.sandbox import say_isolation

log = logging.getLogger(__name__)

Item = tuple[Hashable, str, Question]
"""(key, answer, question)."""
TIMEOUT_SECONDS = 20.0
"""Per item; above the sum of math-verify's own limits, so that those fire first."""
START_SECONDS = 120.0
"""For a worker to import its verifier on a busy machine."""
MEMORY_BYTES = 4 << 30
"""Address space of one worker: an answer such as 9^(9^9) must not take the machine with it."""


@dataclass(slots=True)
class Verdicts:
    """Scores by key, with counts for the metrics."""

    scores: dict[Hashable, float] = field(default_factory=dict)
    """Key -> score in [0, 1]."""
    verified: int = 0
    """Items whose verifier came to a score."""
    failed: int = 0
    """Items whose verifier raised or died; they score 0."""
    timed_out: int = 0
    """Items stopped at the time limit; they score 0."""
    outcomes: dict[Hashable, str] = field(default_factory=dict)
    """Key -> "verified", "timed_out", or the message of what failed."""
    errors: Counter[str] = field(default_factory=Counter)
    """Messages of the failed, with how often each came."""

    def add(self, key: Hashable, outcome: str, score: float) -> None:
        self.scores[key], self.outcomes[key] = score, outcome
        if outcome == "verified":
            self.verified += 1
        elif outcome == "timed_out":
            self.timed_out += 1
        else:
            self.failed += 1
            self.errors[outcome] += 1


def verify_all(
    items: Iterable[Item],
    workers: int = 1,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    pool: WorkerPool | None = None,
) -> Verdicts:
    """Score every item with its question's verifier.

    Cheap verifiers run here; those in `ISOLATED` run in worker processes, where an item that hangs, crashes
    or eats memory costs that item alone. Workers take about a second to start: a caller that verifies often
    passes a `pool` (then `workers` and `timeout_seconds` are the pool's).

    Raises ValueError if a key comes twice, UserError where programs cannot be isolated at all.
    """
    verdicts = Verdicts()
    seen: set[Hashable] = set()
    own = pool if pool is not None else WorkerPool(workers, timeout_seconds)

    def isolated() -> Iterator[Item]:
        for key, answer, question in items:
            if key in seen:
                raise ValueError(f"key {key!r} comes twice; keep one item per key")
            seen.add(key)
            if question.verifier in ISOLATED:
                if question.verifier == "code":
                    say_isolation()
                yield key, answer, question
                continue
            verify = load_verifier(question.verifier)
            try:
                verdicts.add(key, "verified", verify(answer, question))
            except ValueError as error:
                verdicts.add(key, f"ValueError: {error}", 0.0)

    try:
        for key, outcome, score in own.run(isolated()):
            verdicts.add(key, outcome, score)
    finally:
        if pool is None:
            own.close()
    if verdicts.failed or verdicts.timed_out:
        log.warning(
            "%d of %d answers could not be verified and %d ran out of time; all score 0. First errors: %s",
            verdicts.failed,
            len(verdicts.scores),
            verdicts.timed_out,
            verdicts.errors.most_common(3),
        )
    return verdicts


@dataclass(slots=True, eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    key: Any = None
    busy: bool = False
    started: bool = False
    seconds: float = 0.0
    deadline: float = field(default=float("inf"))


class WorkerPool:
    """Up to `size` verifier processes, started as needed and kept until `close`. Not for several threads at
    once.

    They are fresh interpreters, not forks: the caller may hold threads, sockets and a GPU.
    """

    def __init__(self, size: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        if size < 1:
            raise ValueError(f"a pool needs at least one worker, got {size}")
        self._size, self._timeout = size, timeout_seconds
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers. Idempotent."""
        for worker in list(self._workers):
            self._stop(worker)

    def run(self, items: Iterable[Item]) -> Iterator[tuple[Hashable, str, float]]:
        """Yield (key, outcome, score) of every item as it ends; `items` is consumed as workers become free.

        Outcome is "verified", "timed_out" or an error message; the score of the last two is 0.
        Raises RuntimeError if a worker cannot start.
        """
        source = iter(items)
        exhausted = False
        try:
            while True:
                while not exhausted and self._has_room():
                    item = next(source, None)
                    if item is None:
                        exhausted = True
                    else:
                        self._submit(item)
                busy = [worker for worker in self._workers if worker.busy]
                if not busy:
                    return
                yield from self._collect(busy)
        finally:
            # Reached early when the consumer stops or `items` raises: no worker may keep an unread reply.
            for worker in [worker for worker in self._workers if worker.busy]:
                self._stop(worker)

    def _has_room(self) -> bool:
        return len(self._workers) < self._size or not all(worker.busy for worker in self._workers)

    def _submit(self, item: Item) -> None:
        key, answer, question = item
        worker = next((worker for worker in self._workers if not worker.busy), None) or self._start()
        worker.connection.send((question.verifier, answer, question))
        worker.key, worker.busy, worker.started = key, True, False
        worker.seconds = seconds_allowed(question, self._timeout)
        worker.deadline = time.monotonic() + START_SECONDS

    def _collect(self, busy: list[_Worker]) -> Iterator[tuple[Hashable, str, float]]:
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        ready = wait([worker.connection for worker in busy], patience)
        now = time.monotonic()
        for worker in busy:
            key = worker.key
            if worker.connection in ready:
                try:
                    reply = json.loads(worker.connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._stop(worker)
                    if not worker.started:
                        raise RuntimeError(
                            "a verifier process died while starting; see its messages above"
                        ) from None
                    yield key, "the verifier process died", 0.0
                    continue
                if reply == "started":
                    worker.started, worker.deadline = True, now + worker.seconds
                else:
                    worker.busy = False
                    yield key, *reply
            elif now >= worker.deadline:
                self._stop(worker)
                if not worker.started:
                    raise RuntimeError(f"a verifier process did not start in {START_SECONDS:.0f} s")
                yield key, "timed_out", 0.0

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [str(theirs.fileno()), str(MEMORY_BYTES), str(2 * self._timeout + 1)]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "megavar.verifiers.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        worker = _Worker(process, Connection(ours.detach()))
        self._workers.append(worker)
        return worker

    def _stop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.kill()
        worker.process.wait()
