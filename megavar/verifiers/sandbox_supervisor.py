"""Runs a program without namespaces, and ends it with everything it started.

`sandbox_supervisor.py PARENT_PID PATHS COMMAND...`, with PATHS the JSON of {"read": [...], "write": [...],
"remove": [...]}: where the kernel has Landlock, nothing but the first two can be opened; the last end with the
program. As a subreaper the supervisor inherits what escapes into another session. It exits with the command's status,
128 + the signal's number if it was killed; on SIGTERM, or when its parent dies, it kills all and exits. Imports the
standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import struct
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
KEYCTL = {"x86_64": 250, "aarch64": 219}
KEYCTL_JOIN_SESSION_KEYRING = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_BITS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}
"""Kinds of file access, one bit each, that a version of Landlock knows; 16 from version 5 on."""
_libc = ctypes.CDLL(None, use_errno=True)


def main(parent: int, paths: dict[str, list[str]], command: list[str]) -> int:
    """Run `command` to its end, then kill its descendants."""
    for option, value in ((PR_SET_CHILD_SUBREAPER, 1), (PR_SET_PDEATHSIG, int(signal.SIGTERM))):
        _call("prctl", _libc.prctl(option, value, 0, 0, 0))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if os.getppid() != parent:
        return 1
    try:
        child = os.fork()
        if child == 0:
            _become(paths, command)
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # the streams must close with the program, not with us
        return _wait_for(child)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while kill_descendants():
            pass
        for place in paths["remove"]:
            remove(place)


def remove(place: str) -> None:
    """A directory and all that a program has made there: trees too deep for a recursion, directories without rights."""
    for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        os.spawnvp(os.P_WAIT, command[0], [*command, "--", place])


def forget_keys() -> None:
    """Leave the session keyring, which programs would share: Kerberos, for one, keeps tickets there.

    Where a container forbids the call, it forbids programs to read keys as well.
    """
    if (number := KEYCTL.get(os.uname().machine)) is not None:
        _libc.syscall(number, KEYCTL_JOIN_SESSION_KEYRING, None)


def landlock_version() -> int:
    """Of the kernel's Landlock: 1 and more guard files, 4 and more TCP, 6 and more signals; 0 where there is none."""
    return max(0, _libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1))


def restrict(paths: dict[str, list[str]]) -> None:
    """Leave this process and its children the named files and directories, no TCP, and no signals to others."""
    version = landlock_version()
    if version == 0:
        return
    everything = (1 << _BITS.get(version, 16)) - 1
    reading = EXECUTE | READ_FILE | READ_DIR
    # Kinds of access that are denied unless a rule allows them: of files, of TCP (bind, connect), and scopes.
    denied = [everything, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"{len(denied)}Q", *denied)
    rules = _call(
        "landlock_create_ruleset", _libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    )
    for allowed, names in ((reading, paths["read"]), (everything, paths["write"])):
        for name in names:
            descriptor = os.open(name, os.O_PATH | os.O_CLOEXEC)
            of_files = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
            fitting = everything if stat.S_ISDIR(os.stat(descriptor).st_mode) else everything & of_files
            rule = struct.pack("=Qi", allowed & fitting, descriptor)
            _call("landlock_add_rule", _libc.syscall(LANDLOCK_ADD_RULE, rules, 1, rule, 0))
            os.close(descriptor)
    _call("prctl", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _call("landlock_restrict_self", _libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0))
    os.close(rules)


def _become(paths: dict[str, list[str]], command: list[str]) -> None:
    """In the child: the command, or an end that says why not."""
    try:
        for number in set(range(1, signal.SIGSYS + 1)) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        forget_keys()
        restrict(paths)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(126)


def _call(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _wait_for(child: int) -> int:
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def kill_descendants() -> bool:
    """Kill every descendant there is now and reap what has ended; False when there was none."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command's name is in parentheses and may hold anything.
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    ours, found = {os.getpid()}, {os.getpid()}
    while found:
        found = {pid for pid, parent in parents.items() if parent in found} - ours
        ours |= found
    for pid in ours - {os.getpid()}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
