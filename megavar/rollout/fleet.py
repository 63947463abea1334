"""SGLang servers on this machine: started, watched, brought back and stopped.

A server takes requests only while its weights are the current ones: one that died comes back with them before
it is listed and, with a router, before the router hears of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megavar.errors import UserError
from megavar.rollout.control import EngineError, PauseMode, ServerControl, ServerInfo
from megavar.rollout.engine_env import engine_python
from megavar.rollout.process import (
    EngineProcess,
    ServerSpec,
    free_port,
    require_free,
    server_command,
    server_environment,
)
from megavar.rollout.router import Router
from megavar.rollout.servers import (
    Push,
    check_same_shape,
    check_weights,
    pause_all,
    summed_gauges,
    update_all,
)

log = logging.getLogger(__name__)

_POLL_S = 0.25
_STABLE_S = 120.0
"""A server that lived this long is forgiven its earlier deaths."""


class _Member:
    """One place in the fleet: devices, a port, and the process that is there now."""

    def __init__(self, number: int, devices: tuple[str, ...]) -> None:
        self.number = number
        self.devices = devices
        self.process: EngineProcess | None = None
        self.control: ServerControl | None = None
        self.listed = False
        self.stale = False
        """Up, without the weights that the last push brought to the others."""
        self.deaths = 0
        self.incarnation = 0
        self.listed_at = 0.0


class Fleet:
    """N servers on this machine. Safe to use from several threads."""

    def __init__(
        self,
        model: Path,
        *,
        logs: Path,
        spec: ServerSpec | None = None,
        servers: int = 1,
        devices: Sequence[Sequence[str]] = (),
        version: str = "initial",
        router: bool = False,
        host: str = "127.0.0.1",
        ports: Sequence[int] = (),
        seed: int = 0,
        start_timeout_s: float = 900.0,
        hang_timeout_s: float = 180.0,
        max_deaths: int = 5,
        venv: Path | None = None,
    ) -> None:
        """Start all servers and wait until they take requests.

        devices: per server, GPU ids or one CPU core list per tensor-parallel rank. ports: per server; free
        ones by default. logs: directory for one log per server. hang_timeout_s: a server that answers
        nothing for this long is killed and brought back. max_deaths: deaths in a row after which a server is
        given up.
        Raises UserError for bad input and EngineError, with the engine's last lines, when a server does not
        come up; nothing is left running then.
        """
        self._spec = spec or ServerSpec()
        self._python = engine_python(venv)
        self._weights = (check_weights(model), version)
        self._pushed: str | None = None  # version of the current weights where they lie in no directory
        if devices and (len(devices) != servers or any(len(own) != self._spec.tp for own in devices)):
            raise UserError(f"devices must be {servers} groups of {self._spec.tp}, got {devices!r}")
        if ports and len(ports) != servers:
            raise UserError(f"{servers} servers need {servers} ports, got {list(ports)}")
        for port in ports:
            require_free(host, port)
        self._logs, self._host, self._seed, self._ports = Path(logs).absolute(), host, seed, tuple(ports)
        self._start_timeout_s, self._hang_timeout_s = start_timeout_s, hang_timeout_s
        self._max_deaths = max_deaths
        groups = devices or self._default_devices(servers)
        self._members = [_Member(number, tuple(group)) for number, group in enumerate(groups)]
        self._lock = threading.RLock()  # weights and listing change together
        self._closing = threading.Event()
        self._failure: EngineError | None = None
        self._router: Router | None = None
        self._watchers: list[threading.Thread] = []
        self.restarts = 0
        try:
            if router:
                self._router = Router(self._python, self._logs, host)
            with ThreadPoolExecutor(servers) as pool:
                list(pool.map(self._bring_up, self._members))
            info = self._controls()[0].info()
        except BaseException:
            self.close()
            raise
        self._info = info
        for member in self._members:
            watcher = threading.Thread(target=self._watch, args=(member,), daemon=True, name="fleet-watcher")
            watcher.start()
            self._watchers.append(watcher)

    def _default_devices(self, servers: int) -> list[tuple[str, ...]]:
        tp = self._spec.tp
        if self._spec.device == "cuda":
            return [tuple(str(n * tp + rank) for rank in range(tp)) for n in range(servers)]
        # SGLang binds ranks to NUMA nodes unless told; several ranks on one node need to be told.
        return [tuple(str(rank) for rank in range(tp)) if tp > 1 else () for _ in range(servers)]

    def _bring_up(self, member: _Member) -> None:
        """Start a process, wait for it, make its weights current, list it."""
        directory, version = self._weights
        name = f"server-{member.number}"
        port = self._ports[member.number] if self._ports else free_port(self._host)
        command = server_command(
            self._spec,
            python=self._python,
            model=directory,
            version=version,
            host=self._host,
            port=port,
            # Without deterministic mode a server draws from this seed alone: never twice the same.
            seed=self._seed + 1000 * member.incarnation + member.number,
        )
        environment = server_environment(self._spec, member.devices)
        member.incarnation += 1
        with self._lock:
            if self._closing.is_set():
                raise EngineError("the fleet is closed")
            process = EngineProcess(name, command, environment, self._logs / f"{name}.log")
            control = ServerControl(f"http://{self._host}:{port}")
            member.process, member.control = process, control
        process.wait_until(control.answers, self._start_timeout_s, self._closing.is_set)
        process.wait_until(lambda: control.healthy(60.0), self._start_timeout_s, self._closing.is_set)
        with self._lock:
            if self._pushed is not None:
                member.stale = True
                log.warning("%s is back and waits for weights %s or later", name, self._pushed)
                return
            directory, wanted = self._weights
            if control.weight_version() != wanted:  # the weights changed while it was starting
                control.update_from_disk(directory, wanted, flush_cache=True)
            self._list(member)

    def _list(self, member: _Member) -> None:
        """A server that is up and has the current weights takes requests."""
        assert member.control is not None
        if not member.listed and self._router is not None:
            self._router.add(member.control.url)
        member.listed, member.stale, member.listed_at = True, False, time.monotonic()

    def _unlist(self, member: _Member) -> None:
        with self._lock:
            was, member.listed = member.listed, False
            member.stale = False
            if was and self._router is not None and member.control is not None:
                try:
                    self._router.remove(member.control.url)
                except EngineError as error:  # its own health check will find out; the watcher must live on
                    log.warning("%s", error)

    def _watch(self, member: _Member) -> None:
        """Bring the member back whenever it dies or hangs, until the fleet closes or gives it up."""
        while not self._closing.is_set():
            reason = self._wait_for_death(member)
            if reason is None:
                return
            process, control = member.process, member.control
            assert process is not None and control is not None
            error = process.failure(reason)
            self._unlist(member)
            process.stop()
            control.close()
            if time.monotonic() - member.listed_at > _STABLE_S:
                member.deaths = 0
            while not self._closing.is_set():
                member.deaths += 1
                if member.deaths > self._max_deaths:
                    self._give_up(member, error)
                    return
                log.warning("%s; brought back, try %d of %d", error, member.deaths, self._max_deaths)
                if self._closing.wait(min(60.0, 2.0 ** (member.deaths - 1))):
                    return
                try:
                    self._bring_up(member)
                    self.restarts += 1
                    break
                except EngineError as failure:
                    error = failure
                    if member.process is not None:
                        member.process.stop()

    def _wait_for_death(self, member: _Member) -> str | None:
        """What was wrong with it; None when the fleet closes."""
        process, control = member.process, member.control
        assert process is not None and control is not None
        last_sign = checked = time.monotonic()
        while not self._closing.wait(_POLL_S):
            if (status := process.status()) is not None:
                return f"died with status {status}"
            now = time.monotonic()
            if now - checked < self._hang_timeout_s / 6:
                continue
            # A server that is paused or loads weights does not generate: that is not a hang.
            if not self._lock.acquire(blocking=False):
                last_sign = now
                continue
            self._lock.release()
            if control.healthy(max(2.0, self._hang_timeout_s / 6)):
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > self._hang_timeout_s:
                return f"answered nothing for {self._hang_timeout_s:g} s"
            checked = time.monotonic()
        return None

    def _give_up(self, member: _Member, error: EngineError) -> None:
        member.process = None
        log.error("server-%d is given up after %d deaths: %s", member.number, self._max_deaths, error)
        if all(other.process is None for other in self._members):
            self._failure = error

    def endpoints(self) -> list[str]:
        """See `Servers.endpoints`."""
        if self._failure is not None:
            raise EngineError(f"every server died {self._max_deaths} times; the last one: {self._failure}")
        if self._closing.is_set():
            raise EngineError("the fleet is closed")
        if self._router is not None:
            self._router.require_alive()
            return [self._router.url]
        return self.servers()

    def servers(self) -> list[str]:
        """URLs of the servers that serve with current weights."""
        return [
            member.control.url for member in self._members if member.listed and member.control is not None
        ]

    def _controls(self) -> list[ServerControl]:
        return [member.control for member in self._members if member.listed and member.control is not None]

    def info(self) -> ServerInfo:
        return self._info

    def weight_version(self) -> str:
        return self._pushed or self._weights[1]

    @contextmanager
    def pushing(self, version: str, mode: PauseMode) -> Iterator[Push]:
        """See `Servers.pushing`. A server that missed a push takes part in the next; one left with a mixture is
        killed, and comes back with the weights of the last directory to wait for a push."""
        with self._lock:
            members = {
                member.control.url: member
                for member in self._members
                if member.control is not None and (member.listed or member.stale)
            }
            controls = [member.control for member in members.values() if member.control is not None]
            push = Push(pause_all(controls, mode))
            try:
                yield push
            finally:
                if push.arrived:
                    self._pushed = version
                for url, member in members.items():
                    self._settle(member, push.outcome(url), push.arrived)

    def _settle(self, member: _Member, outcome: Push.Outcome, arrived: bool) -> None:
        assert member.control is not None and member.process is not None
        try:
            if outcome != "torn":
                member.control.resume()
        except EngineError as error:
            log.warning("%s", error)
            outcome = "torn"
        if outcome == "torn":
            self._unlist(member)
            member.process.stop()  # its watcher brings it back
        elif outcome == "arrived":
            self._list(member)
        elif arrived:
            self._unlist(member)
            member.stale = True

    def lies_in(self, directory: Path) -> None:
        """The weights of the last push lie in this directory too: servers that come back load them from there.

        Raises UserError when it holds no weights.
        """
        with self._lock:
            if self._pushed is None:
                return
            self._weights, self._pushed = (check_weights(directory), self._pushed), None
            for member in self._members:
                if member.stale and member.control is not None and member.process is not None:
                    try:
                        member.control.update_from_disk(*self._weights, flush_cache=True)
                        self._list(member)
                    except EngineError as error:
                        log.warning("%s", error)
                        member.process.stop()  # its watcher brings it back

    @contextmanager
    def paused(self, mode: PauseMode) -> Iterator[None]:
        with self._lock:
            controls = self._controls()
            for control in controls:
                control.pause(mode)
            try:
                yield
            finally:
                for control in controls:
                    control.resume()

    def update_weights(self, directory: Path, version: str, mode: PauseMode = "retract") -> None:
        """Swap the weights of every server. A server that fails while others succeed is killed and comes back
        with the new weights; when all fail the old weights stay and EngineError tells why."""
        directory = check_weights(directory)
        check_same_shape(self._weights[0], directory)
        with self._lock:
            members = [member for member in self._members if member.listed or member.stale]
            controls = [member.control for member in members if member.control is not None]
            previous, self._weights = (self._weights, self._pushed), (directory, version)
            self._pushed = None
            failures = update_all(controls, directory, version, mode)
            if failures and len(failures) == len(controls):
                self._weights, self._pushed = previous
                raise EngineError("; ".join(str(error) for error in failures.values()))
            for member in members:
                assert member.control is not None and member.process is not None
                if member.control.url in failures:
                    log.warning("%s", failures[member.control.url])
                    self._unlist(member)
                    member.process.stop()
                else:
                    self._list(member)

    def drain(self, timeout_s: float = 600.0) -> None:
        """Wait until no server runs or queues a request. Raises EngineError when time is up."""
        deadline = time.monotonic() + timeout_s
        while any(self.gauges().get(name, 0.0) > 0 for name in ("num_running_reqs", "num_queue_reqs")):
            if time.monotonic() > deadline:
                raise EngineError(f"requests still run after {timeout_s:g} s")
            time.sleep(_POLL_S)

    def gauges(self) -> dict[str, float]:
        return summed_gauges(self._controls())

    def close(self) -> None:
        """End every server and the router with all their children. Idempotent."""
        self._closing.set()
        with self._lock:
            processes = [member.process for member in self._members if member.process is not None]
        with ThreadPoolExecutor(max(1, len(processes))) as pool:
            list(pool.map(EngineProcess.stop, processes))
        for watcher in self._watchers:
            watcher.join()
        for member in self._members:
            member.listed = False
            if member.control is not None:
                member.control.close()
        if self._router is not None:
            self._router.close()
