"""Run one command so that nothing of it outlives the process that asked for it.

`python lifeline.py COMMAND ...` with a pipe as standard input. The command ends, with every descendant, when
the pipe is closed, which the kernel does when the owner dies in any way, SIGKILL included; and when the
command's own process ends, whatever it left behind is ended too. Exits with the command's status
(128 + signal).

Runs as a script, in a process of its own, and imports nothing of megavar.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 5.0


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _end_descendants() -> None:
    """SIGTERM, then SIGKILL. Orphans are re-parented to this process, so the list is complete."""
    me = psutil.Process()
    signum, patience = signal.SIGTERM, _GRACE_S
    while children := me.children(recursive=True):
        for child in children:
            try:
                child.send_signal(signum)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(children, timeout=patience)
        signum, patience = signal.SIGKILL, 1.0


def main(command: list[str]) -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # For the one end that the pipe does not cover: this process itself killed.
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        ended = os.pidfd_open(child.pid)
        ready, _, _ = select.select([sys.stdin, ended], [], [])
        if ended not in ready:
            return 128 + signal.SIGTERM
        code = child.wait()
        return code if code >= 0 else 128 - code
    finally:
        _end_descendants()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
