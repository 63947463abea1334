"""What the transports that write into running servers share: the servers of one push, and what became of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from megavar.models.layout import LayoutTable
from megavar.models.shards import local_shards
from megavar.rollout.control import EngineError
from megavar.rollout.servers import Push
from megavar.sync.collective import on_main
from megavar.sync.engines import EngineCalls, EngineState, RankFailure, at_once, is_complete
from megavar.sync.group import Membership
from megavar.sync.transport import SyncError, SyncOptions


class Session:
    """One push. Collective context: servers are paused inside, and on leaving it resumed or taken out of service.

    On rank 0 `calls` reaches the servers that still take part; elsewhere it is empty.
    """

    def __init__(self, options: SyncOptions, version: str) -> None:
        self._options, self._version = options, version
        self._stack = ExitStack()
        self._push: Push | None = None
        self.calls: list[EngineCalls] = []
        self.states: dict[str, EngineState] = {}
        """Of every server that takes part, on every rank."""
        self.failed: dict[str, str] = {}
        """Server -> why it dropped out; complete on rank 0."""
        self.began = time.perf_counter()

    def __enter__(self) -> Self:
        try:
            on_main(self._open)
            self.states = on_main(self._look)
            if not self.states:
                told = on_main(lambda: "; ".join(self.failed.values()))
                raise EngineError(f"no server can take weights {self._version!r}: {told or 'none is up'}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _open(self) -> None:
        servers, patience = self._options.servers, self._options.timeout_s
        assert servers is not None, "rank 0 needs the servers"
        self._push = self._stack.enter_context(servers.pushing(self._version, self._options.pause_mode))
        # twice: the engines give up first and say why
        self.calls = [EngineCalls(c.url, 2 * patience) for c in self._push.controls]
        for call in self.calls:
            self._stack.callback(call.close)

    def _look(self) -> dict[str, EngineState]:
        assert self._push is not None
        for call in self.calls:
            self._push.settle(call.url, "unchanged")
        states: dict[str, EngineState] = {}
        for url, answer in at_once(self.calls, EngineCalls.state).items():
            if isinstance(answer, EngineError):
                self.drop(url, answer)
            else:
                states[url] = answer
        return states

    def drop(self, url: str, error: EngineError, *, written: bool = False) -> None:
        """Rank 0: a server takes no further part. written: some of its weights may be new."""
        assert self._push is not None
        torn = written and not (isinstance(error, RankFailure) and error.outcome == "refused")
        self._push.settle(url, "torn" if torn else "unchanged")
        self.failed[url] = str(error)
        for call in [call for call in self.calls if call.url == url]:
            self.calls.remove(call)
            if not torn:
                self._give_back(call)

    def _give_back(self, call: EngineCalls) -> None:
        """Nothing was written: the server may call its weights what they were."""
        assert self._push is not None
        before = self.states.get(call.url)
        try:
            if not is_complete(call.version()):
                call.end()
                if before is not None and is_complete(before.version):
                    call.set_version(before.version)
                else:
                    self._push.settle(call.url, "torn")  # an earlier push left it so
        except EngineError:
            self._push.settle(call.url, "torn")

    def begin(self) -> None:
        """Collective: from here on the servers call their weights incomplete."""

        def action() -> None:
            for url, answer in at_once(self.calls, EngineCalls.begin).items():
                if isinstance(answer, EngineError):
                    self.drop(url, answer)

        on_main(action)

    def finish(self) -> None:
        """Rank 0: those that took every byte close the update, and must report the version."""
        assert self._push is not None

        def close(call: EngineCalls) -> None:
            call.end()
            if (found := call.version()) != self._version:
                raise EngineError(
                    f"{call.url}: reports weights {found!r} after an update to {self._version!r}"
                )

        for url, answer in at_once(self.calls, close).items():
            if isinstance(answer, EngineError):
                self.drop(url, answer, written=True)
            else:
                self._push.settle(url, "arrived")

    def conclude(self, membership: Membership | None = None) -> list[str]:
        """Collective: the update is closed everywhere; a group that lost a member is left. URLs that have the weights.

        Raises SyncError when no server took them.
        """
        on_main(self.finish)
        self.failed = on_main(lambda: self.failed)
        if self.failed and membership is not None:
            membership.leave(self.calls)
        arrived = [url for url in self.states if url not in self.failed]
        if not arrived:
            raise SyncError(f"no server took weights {self._version!r}: " + "; ".join(self.failed.values()))
        return arrived

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def parameters(
    model_chunks: Sequence[torch.nn.Module], table: LayoutTable
) -> tuple[dict[str, torch.Tensor], torch.device]:
    """This rank's shards by canonical name, contiguous, and where they are."""
    found = {s.tensor.name: s.parameter.detach().contiguous() for s in local_shards(model_chunks, table)}
    return found, next(iter(found.values())).device
