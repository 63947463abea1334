"""Programs that mean harm, run in the sandbox: what they reach for stays whole, and nothing of them is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from megavar.errors import UserError
from megavar.verifiers import sandbox
from megavar.verifiers.sandbox import Isolation, Limits, isolation, run
from megavar.verifiers.sandbox_supervisor import landlock_version

PLAIN = Isolation(weakness="tested without namespaces")
SHORT = Limits(wall_seconds=1.0)


@pytest.fixture(scope="module")
def strong() -> Isolation:
    kind = isolation()
    if not kind.bwrap:
        pytest.skip(str(kind))
    return kind


# The disk and, for root, the number of processes have no limit without namespaces: those tests are `strong` alone.
@pytest.fixture(params=["namespaces", "plain"])
def kind(request) -> Isolation:
    return request.getfixturevalue("strong") if request.param == "namespaces" else PLAIN


@pytest.fixture
def mark():
    """A comment for a program, by which its processes are known."""
    token = f"program-{uuid.uuid4().hex}"
    yield f"# {token}\n"
    deadline = time.monotonic() + 20  # the kernel takes a moment to end a namespace
    while (left := processes(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def needs_landlock(kind: Isolation, version: int) -> None:
    if not kind.bwrap and landlock_version() < version:
        pytest.skip(f"this kernel has no Landlock of version {version}")


def processes(token: str) -> list[int]:
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and token.encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [pid for pid in found if pid != os.getpid()]


def test_a_program_gets_its_input_and_its_ending_is_told(kind, mark):
    program = mark + (
        "import os, sys\n"
        "print(sys.stdin.read() * 2)\n"
        "os.write(int(sys.argv[2]), os.read(int(sys.argv[1]), 9))\n"
        "print(sys.argv[3:], file=sys.stderr)\n"
        "sys.exit(7)"
    )
    outcome = run(program, ["a"], stdin="né".encode(), job=b"work", kind=kind)
    assert (outcome.status, outcome.code) == ("exited", 7)
    assert (outcome.output.decode(), outcome.result, outcome.errors) == ("néné\n", b"work", b"['a']\n")
    assert run(mark + "import os; os.kill(os.getpid(), 9)", kind=kind).code == 128 + signal.SIGKILL


def test_endless_output_is_cut_at_the_limit(kind, mark):
    limits = Limits(output_bytes=100_000)
    for stream in ("stdout", "stderr"):
        outcome = run(
            mark + f"import sys\nwhile True: sys.{stream}.write('x' * 4096)", kind=kind, limits=limits
        )
        assert outcome.status == "too_much_output"
        assert len(outcome.output) <= 100_000 and len(outcome.errors) <= sandbox.STDERR_BYTES


def test_sleep_and_busy_loops_end_at_their_limits(kind, mark):
    assert run(mark + "import time; time.sleep(1000)", limits=SHORT, kind=kind).status == "timed_out"
    limits = Limits(cpu_seconds=1, wall_seconds=120)
    assert run(mark + "while True: pass", limits=limits, kind=kind).status == "timed_out"
    stubborn = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(mark + stubborn, limits=limits, kind=kind).code == 128 + signal.SIGKILL
    closed = "import os, time; os.close(1); os.close(2); os.closerange(3, 64); time.sleep(1000)"
    assert run(mark + closed, limits=SHORT, kind=kind).status == "timed_out"


def test_memory_is_limited(kind, mark):
    outcome = run(mark + "x = bytearray(1 << 30)", limits=Limits(memory_bytes=512 << 20), kind=kind)
    assert outcome.code == 1 and b"MemoryError" in outcome.errors


DAEMON = """
import os, sys, time
for place in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if place:
                os.closerange(0, 64)
            time.sleep(1000)
        os._exit(0)
print("right")
"""


def test_daemons_end_with_the_program(kind, mark):
    outcome = run(mark + DAEMON, kind=kind, limits=Limits(wall_seconds=120))
    assert (outcome.status, outcome.code, outcome.output) == ("exited", 0, b"right\n")


def test_a_killed_caller_leaves_nothing(kind, mark, tmp_path):
    program = mark + DAEMON + "sys.stdout.flush(); time.sleep(1000)"
    caller = (
        "import sys; from megavar.verifiers.sandbox import *\n"
        "run(sys.argv[1], kind=eval(sys.argv[2]), limits=Limits(wall_seconds=900))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", caller, program, repr(kind)], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        while len(processes(mark.strip("# \n"))) < 5:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_fork_bombs_stay_within_their_number(strong, mark):
    program = mark + (
        "import os, sys, time\n"
        "while True:\n"
        "    try:\n"
        "        os.fork()\n"
        "    except BlockingIOError:\n"
        "        time.sleep(0.01)\n"
    )
    token, most = mark.strip("# \n"), 0
    caller = (
        "import sys; from megavar.verifiers.sandbox import *\n"
        "print(run(sys.argv[1], limits=Limits(processes=12, wall_seconds=3)).status)"
    )
    process = subprocess.Popen([sys.executable, "-c", caller, program], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        most = max(most, len(processes(token)))
        time.sleep(0.02)
    assert process.communicate()[0] == "timed_out\n"
    # The caller, bubblewrap's two processes and the tools before the program bear its text as well.
    assert 3 < most <= 12 + 5


def test_files_outside_are_neither_seen_nor_changed(kind, mark, monkeypatch):
    needs_landlock(kind, 1)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        spared(Path(name), kind, mark, monkeypatch)


def spared(place: Path, kind: Isolation, mark: str, monkeypatch) -> None:
    canary = place / "canary"
    canary.write_text("secret")
    place.chmod(0o777)  # permissions shall not be what protects it
    canary.chmod(0o666)
    monkeypatch.setenv("CANARY", "secret")
    repository = Path(sandbox.__file__).parents[2]
    program = (
        mark
        + f"""
import os, subprocess
for path in {str(canary)!r}, {str(repository / "setup.py")!r}, os.path.expanduser("~root/.bashrc"), "/etc/passwd":
    try:
        print(open(path).read())
    except OSError:
        print("hidden")
print(os.environ.get("CANARY"))
subprocess.run(["rm", "-rf", {str(place)!r}], stderr=subprocess.DEVNULL)
try:
    canary = open({str(canary)!r}, "w")
except OSError:
    canary = None
print(canary)
try:
    open({os.path.join(sys.prefix, "planted")!r}, "w")
except OSError:
    print("read-only")
"""
    )
    outcome = run(program, kind=kind, limits=Limits(wall_seconds=120))
    assert outcome.errors == b""
    assert outcome.output.decode().split("\n") == [*["hidden"] * 4, "None", "None", "read-only", ""]
    assert canary.read_text() == "secret"


def test_no_tree_is_too_deep_to_be_removed(mark, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        mark + "import os\nfor _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')\nos.chmod('.', 0)"
    )
    assert run(program, kind=PLAIN).code == 0
    assert not list(tmp_path.iterdir())


def test_disk_is_limited(strong, mark):
    program = (
        mark
        + """
for number in range(100):
    try:
        with open(f"file-{number}", "wb") as file:
            file.write(bytes(1 << 20))
    except OSError as error:
        print(number, error.strerror)
        break
"""
    )
    outcome = run(program, kind=strong, limits=Limits(disk_bytes=8 << 20, wall_seconds=60))
    number, reason = outcome.output.decode().strip().split(" ", 1)
    assert 5 <= int(number) <= 8 and reason == "No space left on device"
    big = "open('file', 'wb').write(bytes(1 << 20))"
    assert run(mark + big, kind=strong, limits=Limits(file_bytes=1 << 16)).code != 0


def test_the_network_is_out_of_reach(kind, mark):
    needs_landlock(kind, 6)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        with socket.socket(socket.AF_UNIX) as abstract:
            name = f"\0{uuid.uuid4().hex}"
            abstract.bind(name)
            abstract.listen()
            program = (
                mark
                + f"""
import socket
for family, address in (socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, {name!r}):
    try:
        socket.socket(family).connect(address)
        print("connected")
    except OSError as error:
        print("no", error.errno)
"""
            )
            outcome = run(program, kind=kind)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [line.split()[0] for line in outcome.output.decode().splitlines()] == ["no", "no"]


def test_a_program_cannot_signal_who_watches_it(mark):
    needs_landlock(PLAIN, 6)
    program = (
        mark
        + """
import os
try:
    os.kill(os.getppid(), 0)
except PermissionError:
    print("refused")
"""
    )
    assert run(program, kind=PLAIN).output == b"refused\n"


def test_it_has_no_rights_to_regain(strong, mark):
    program = (
        mark
        + """
import os
status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(status["CapEff"].strip(), status["CapPrm"].strip(), status["NoNewPrivs"].strip())
try:
    os.kill(-1, 9)
except ProcessLookupError:
    print("alone")
"""
    )
    if not strong.proc:
        pytest.skip("no /proc in the sandbox here")
    lines = run(program, kind=strong).output.decode().splitlines()
    assert lines == [f"{0:016x} {0:016x} 1", "alone"]


def test_missing_namespaces_are_said_and_root_is_never_left_unguarded(monkeypatch):
    monkeypatch.setattr(sandbox, "bwrap_paths", lambda: [])
    sandbox.isolation.cache_clear()
    try:
        try:
            kind = isolation()
        except UserError as error:
            assert os.geteuid() == 0 and "cannot run as root here: bubblewrap is not installed" in str(error)
        else:
            assert "no namespaces (bubblewrap is not installed" in kind.weakness
            assert kind.uid == (os.geteuid() == 0)
    finally:
        sandbox.isolation.cache_clear()
