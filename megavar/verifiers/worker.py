"""A verifier process: `python -m megavar.verifiers.worker FD MEMORY_BYTES CPU_SECONDS`.

Reads pickles from the socket FD and answers in JSON: nothing that an answer might make of this process can reach into
its parent. For each (verifier, answer, question) it says "started" once the verifier is imported, so that the time
limit counts the verifying alone, then [outcome, score]. Ends when its parent does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megavar.verifiers.registry import load_verifier
from megavar.verifiers.sandbox_supervisor import forget_keys


def main(connection: Connection, cpu_seconds: float) -> None:
    """Serve until the parent closes its end. Exceeding `cpu_seconds` on one item kills the process."""
    while True:
        try:
            name, answer, question = connection.recv()
        except EOFError:
            return
        verify = load_verifier(name)
        _say(connection, "started")
        # The parent kills a process that hangs; this is for the one whose parent was killed meanwhile. It
        # must end even inside C code, where no Python handler runs: SIGPROF's default action is to terminate.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            with (
                open(os.devnull, "w") as null,
                contextlib.redirect_stdout(null),
                contextlib.redirect_stderr(null),
            ):
                reply = "verified", verify(answer, question)
        except TimeoutError:
            reply = "timed_out", 0.0
        except (
            Exception
        ) as error:  # scorers are third-party code and may raise anything; the parent reports it
            reply = f"{type(error).__name__}: {error}"[:300], 0.0
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(connection, reply)


def _say(connection: Connection, what: Any) -> None:
    connection.send_bytes(json.dumps(what).encode())


if __name__ == "__main__":
    # Ctrl-C reaches the whole group, and Slurm signals every process of a step: ending the workers is the parent's
    # business. An answer must not count as wrong because the job was asked to make room.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Programs in answers inherit both: no keys, and to be taken first when the machine runs out of memory.
    forget_keys()
    Path("/proc/self/oom_score_adj").write_text("1000")
    memory = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    main(Connection(int(sys.argv[1])), float(sys.argv[3]))
