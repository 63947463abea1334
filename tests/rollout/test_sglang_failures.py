"""Servers that die, hang, or never come up; and what is left of them: nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rollout_helpers import by_key, full_logprobs, requests
from transformers import AutoModelForCausalLM

from megavar.errors import UserError
from megavar.rollout import lifeline
from megavar.rollout.control import EngineError, ServerControl
from megavar.rollout.engine import SamplingParams
from megavar.rollout.fleet import Fleet, _Member
from megavar.rollout.process import ServerSpec
from megavar.rollout.servers import ExternalServers
from megavar.rollout.sglang import SGLangEngine


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def update(fleet: Fleet, directory: Path) -> None:
    fleet.update_weights(directory, "b", "retract")


def push(fleet: Fleet, directory: Path) -> None:
    """As another transport would: the fleet sees no directory until it is told."""
    with fleet.pushing("b", "retract") as push:
        for control in push.controls:
            control.update_from_disk(directory, "b", flush_cache=True)
            push.settle(control.url, "arrived")
    fleet.lies_in(directory)


def test_a_router_that_does_not_answer_keeps_no_dead_server_listed(caplog: pytest.LogCaptureFixture) -> None:
    """The thread that brings servers back unlists them first: it must outlive a router in trouble."""

    class Hung:
        def remove(self, url: str) -> None:
            raise EngineError(f"router: did not remove {url}")

    fleet, member = Fleet.__new__(Fleet), _Member(0, ())
    fleet._lock, fleet._router = threading.RLock(), Hung()  # type: ignore[assignment]
    member.control, member.listed, fleet._members = ServerControl("http://127.0.0.1:9"), True, [member]
    fleet._unlist(member)
    assert not member.listed and fleet.servers() == []
    assert "did not remove http://127.0.0.1:9" in caplog.text


@pytest.mark.engine
@pytest.mark.parametrize("swap", [update, push])
def test_a_killed_server_loses_and_doubles_nothing(fleet, engine, tiny_model, other_model, swap):
    """One of two servers dies under load after an update: every trace comes once, the same that its seed
    gives undisturbed, and the server that comes back serves the updated weights."""
    asked, params = requests(60, 4, low=3, high=8), SamplingParams(max_tokens=120)
    try:
        swap(fleet, other_model)
        victim = fleet._members[0]
        url, restarts = victim.control.url, fleet.restarts
        (main,) = psutil.Process(victim.process.pid).children()
        family = [main, *main.children(recursive=True)]
        stream = engine.generate(asked, params)
        done = [next(stream) for _ in range(20)]
        main.send_signal(signal.SIGKILL)
        done.extend(stream)
        found = by_key(done)
        assert set(found) == {(request.id, k) for request in asked for k in range(4)}
        assert {span.version for c in done for span in c.weight_spans} == {"b"}
        deadline = time.monotonic() + 240
        while fleet.restarts == restarts or len(fleet.servers()) < 2:
            assert time.monotonic() < deadline, "the server did not come back"
            time.sleep(0.2)
        assert not alive(family)
        assert victim.control.url != url and victim.control.weight_version() == "b"
        back = SGLangEngine(ExternalServers([victim.control.url]))
        model = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32).eval()
        for c in back.generate(asked[:6], params):
            np.testing.assert_array_equal(c.ids, found[c.request_id, c.index].ids)
            request = next(r for r in asked if r.id == c.request_id)
            expected = full_logprobs(model, request.prompt_ids, c.ids, 1.0)
            np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)
        back.close()
    finally:
        fleet.update_weights(tiny_model, "a", "retract")


@pytest.mark.engine
def test_a_hanging_server_is_an_error_in_time(fleet):
    member = fleet._members[1]
    (main,) = psutil.Process(member.process.pid).children()
    client = SGLangEngine(ExternalServers([member.control.url]), timeout_s=2.0)
    main.suspend()
    try:
        started = time.monotonic()
        with pytest.raises(EngineError, match=rf"{member.control.url} did not answer within 2 s.*hangs"):
            list(client.generate(requests(2, 2), SamplingParams(max_tokens=4)))
        assert time.monotonic() - started < 10
    finally:
        main.resume()
    assert len(list(client.generate(requests(2, 2), SamplingParams(max_tokens=4)))) == 4
    client.close()


@pytest.mark.engine
def test_tensor_parallel_server_and_its_hang(engine_venv, tiny_model, tmp_path):
    """TP=2 gives Hugging Face's log-probs; suspended for too long it is killed and brought back."""
    fleet = Fleet(
        tiny_model, logs=tmp_path, spec=ServerSpec(tp=2), hang_timeout_s=20.0, version="a", venv=engine_venv
    )
    engine = SGLangEngine(fleet)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    asked, params = requests(8, 4), SamplingParams(max_tokens=30)
    first = by_key(engine.generate(asked, params))
    for request in asked:
        for k in range(4):
            c = first[request.id, k]
            expected = full_logprobs(model, request.prompt_ids, c.ids, 1.0)
            np.testing.assert_allclose(c.logprobs, expected, atol=1e-4)
    (main,) = psutil.Process(fleet._members[0].process.pid).children()
    family = [main, *main.children(recursive=True)]
    assert len(family) >= 4  # the server, two ranks, the detokenizer
    for process in family:
        process.suspend()
    again = by_key(engine.generate(asked, params))  # waits for the server to be killed and brought back
    assert fleet.restarts == 1 and not alive(family)
    for key, c in first.items():
        np.testing.assert_array_equal(c.ids, again[key].ids)
    family = psutil.Process(fleet._members[0].process.pid).children(recursive=True)
    engine.close()
    engine.close()
    assert not alive(family)


@pytest.mark.engine
def test_an_engine_that_dies_at_start_is_quoted(engine_venv, tiny_model, tmp_path):
    with pytest.raises(EngineError, match=r"server-0: ended with status (?s:.*)no-such-flag"):
        Fleet(tiny_model, logs=tmp_path, spec=ServerSpec(flags=("--no-such-flag",)), venv=engine_venv)
    assert not [
        p for p in psutil.Process().children(recursive=True) if str(tmp_path) in " ".join(p.cmdline())
    ]


@pytest.mark.engine
def test_bad_starts_are_named_before_anything_runs(engine_venv, tiny_model, tmp_path):
    with pytest.raises(UserError, match="not a Hugging Face directory"):
        Fleet(tmp_path / "nowhere", logs=tmp_path, venv=engine_venv)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            Fleet(tiny_model, logs=tmp_path, ports=[port], venv=engine_venv)
        taken.close()
        with pytest.raises(UserError, match=f"no SGLang server answers at http://127.0.0.1:{port}"):
            ExternalServers([f"http://127.0.0.1:{port}"])
    with pytest.raises(UserError, match="2 groups of 1"):
        Fleet(tiny_model, logs=tmp_path, servers=2, devices=[("0",)], venv=engine_venv)
    with pytest.raises(UserError, match="make engine-env"):
        Fleet(tiny_model, logs=tmp_path, venv=tmp_path / "no-venv")


@pytest.mark.parametrize("end", ["owner killed", "pipe closed", "command ends"])
def test_lifeline_leaves_nothing_behind(tmp_path: Path, end: str):
    """A command with a child that ignores SIGTERM and a grandchild in a session of its own."""
    inner = f"trap '' TERM; setsid sleep 1000 & sleep 1000 & touch {tmp_path}/up; " + (
        "exit 7" if end == "command ends" else "wait"
    )
    owner = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, {lifeline.__file__!r}, 'bash', '-c', {inner!r}], stdin=-1)\n"
        f"{'p.stdin.close()' if end == 'pipe closed' else 'pass'}\n"
        "print(p.wait(), flush=True)\n"
        "time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "up").exists() and end != "pipe closed":
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    if end == "owner killed":
        assert len(family) >= 4
        os.kill(process.pid, signal.SIGKILL)
    else:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == ("7" if end == "command ends" else "143")
    _, left = psutil.wait_procs(family, timeout=20)
    assert not alive(left)
    process.kill()
    process.wait()
