"""The environment of the SGLang servers, and servers that somebody else runs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from megavar.doctor.check import Check, Status
from megavar.errors import UserError
from megavar.rollout.control import NO_EXPERTS, EngineError, ServerControl
from megavar.rollout.engine_env import REQUIREMENTS, engine_python

_POLL_SECONDS = 2.0
_PACKAGES = ("sglang", "sglang-router", "torch")
_ASK = """
import importlib.metadata as m, json
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in %r}))
"""


def check_engine_environment(venv: Path | None, *, needed: bool, gpus: bool) -> Check:
    """venv: as in `rollout.servers.venv`. needed: the recipe starts servers here."""
    try:
        python = engine_python(venv)
    except UserError as error:
        if not needed:
            found = "none; needed for SGLang servers only"
            return Check(group="engine", name="environment", status="ok", found=found)
        return Check(group="engine", name="environment", status="fail", found="none", fix=str(error))
    command = [str(python), "-c", _ASK % (_PACKAGES,)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        fix = f"build it again: rm -r {python.parent.parent} && make engine-env"
        return Check(
            group="engine", name="environment", status="fail", found=f"{python} does not run", fix=fix
        )
    versions: dict[str, str | None] = json.loads(done.stdout)
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    wrong = [name for name, pin in pins().items() if versions.get(name) != pin]
    if wrong:
        fix = f"{', '.join(wrong)}: not the pinned version; build it again: make engine-env"
    elif gpus and "+cpu" in (versions["torch"] or ""):
        wrong, fix = (
            ["torch"],
            "a CPU build on a machine with GPUs: remove the environment, then make engine-env",
        )
    else:
        fix = ""
    status: Status = "ok" if not wrong else "fail" if needed else "warn"
    where = f"{found} ({python.parent.parent})"
    return Check(group="engine", name="environment", status=status, found=where, fix=fix)


def pins() -> dict[str, str]:
    """Package -> version of what the engine environment is built from, on a GPU machine."""
    lines = REQUIREMENTS["gpu"].read_text().splitlines()
    pinned = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip(): version.strip() for name, _, version in pinned}


def await_servers(urls: Sequence[str], seconds: float) -> None:
    """Return when all generate tokens, or after `seconds`; `check_servers` says which of them do not."""
    deadline = time.monotonic() + seconds
    waiting = list(urls)
    while waiting and time.monotonic() < deadline:
        waiting = [url for url in waiting if not serves(url)]
        if waiting:
            time.sleep(_POLL_SECONDS)


def serves(url: str) -> bool:
    """Whether the server generates tokens now."""
    return _state(url)[1] == ""


def check_servers(urls: Sequence[str], *, experts: bool = False) -> list[Check]:
    """Servers that the recipe names by URL: does each answer, and generate a token?

    experts: the recipe wants to be told which experts tokens went to (`rollout.replay_experts`).
    """
    checks = []
    for url in urls:
        found, fix = _state(url, experts=experts)
        checks.append(Check(group="engine", name=url, status="fail" if fix else "ok", found=found, fix=fix))
    return checks


def _state(url: str, *, experts: bool = False) -> tuple[str, str]:
    """What a server does, and what to do about it; the latter is empty where it serves."""
    control = ServerControl(url)
    try:
        if not control.answers(timeout_s=10.0):
            return "no answer", "start it, or take its URL out of the recipe"
        if not control.healthy(timeout_s=60.0):
            return "answers, but generates no token", "see its log; restart it"
        if experts and not control.returns_experts():
            return "serves, but returns no experts", NO_EXPERTS
        return f"serves weights {control.weight_version()!r}", ""
    except EngineError as error:
        return f"went away: {error}", "see its log; restart it"
    finally:
        control.close()
