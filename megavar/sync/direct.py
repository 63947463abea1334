"""Shard to shard: every sender gives every engine rank exactly its own ranges, straight into the live parameters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from megavar.models.parallel_layout import ParallelLayout
from megavar.rollout.control import EngineError
from megavar.sync.collective import gathered, on_main
from megavar.sync.engines import RankFailure, at_once, planned_layout
from megavar.sync.group import EngineGroup, Members, Membership
from megavar.sync.instruct import instruct
from megavar.sync.plan import plan
from megavar.sync.sender import Outgoing, SentTo, outgoing, send
from megavar.sync.session import Session, parameters
from megavar.sync.transport import SyncError, SyncOptions, SyncReport
from megavar.sync.verify import verify_engines
from megavar.sync.wire import Wire


class DirectSync:
    """See `megavar.sync.transport.open_sync`.

    Plans, tables and the process group live on between pushes; they are made anew when a layout or the set of
    servers changes, and after a failure.
    """

    def __init__(self, options: SyncOptions) -> None:
        self._options = options
        self._membership = Membership(host=options.host, timeout_s=options.timeout_s)
        self._links: dict[str, list[Outgoing]] = {}

    def push(
        self,
        model_chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        version: str,
        *,
        verify: bool = True,
    ) -> SyncReport:
        """See `WeightSync.push`."""
        with Session(self._options, version) as session:
            wire, group, mine = self._prepared(session, model_chunks, layout)
            session.begin()
            began = time.perf_counter()
            sent, received = self._transfer(session, wire, group, mine, version)
            transferred = time.perf_counter() - began
            session.conclude(self._membership)
            if verify:
                verify_engines(session, mine, wire)
            return SyncReport(
                transport="direct",
                version=version,
                seconds=session.seconds,
                transfer_seconds=transferred,
                sent_bytes=sent,
                received_bytes=received,
                failed=session.failed,
                verified=verify,
            )

    def plain_copy(
        self, model_chunks: Sequence[torch.nn.Module], layout: ParallelLayout, version: str
    ) -> float:
        """Seconds that the bytes of a push take where nothing is packed, cast or written: what `push` is measured
        against. Every message but a link's last is full. Collective; the servers keep their weights, which are
        `version`.

        Raises SyncError as `push` does.
        """
        with Session(self._options, version) as session:
            wire, group, mine = self._prepared(session, model_chunks, layout, runs=False)
            began = time.perf_counter()
            self._transfer(session, wire, group, mine, None)
            seconds = time.perf_counter() - began
            if failed := on_main(lambda: session.failed):
                raise SyncError("; ".join(failed.values()))
            return seconds

    def _prepared(
        self,
        session: Session,
        model_chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        *,
        runs: bool = True,
    ) -> tuple[Wire, EngineGroup, dict[str, torch.Tensor]]:
        """Plan, process group and instructions for the servers that take part; this rank's parameters."""
        engine = planned_layout(self._options.architecture, session.states)
        moves = plan(self._options.architecture, layout, engine, len(session.states))
        mine, device = parameters(model_chunks, moves.table)
        members = Members(layout.ranks, tuple((url, engine.tp) for url in session.states))
        group = self._membership.of(members, session.calls, device)
        wire = Wire(moves, self._options.bucket_bytes, runs=runs)
        if wire.fingerprint not in group.instructed:
            instruct(session, wire)
            self._links[wire.fingerprint] = outgoing(wire, dist.get_rank())
            group.instructed.add(wire.fingerprint)
        return wire, group, mine

    def _transfer(
        self,
        session: Session,
        wire: Wire,
        group: EngineGroup,
        mine: dict[str, torch.Tensor],
        version: str | None,
    ) -> tuple[int, dict[str, int]]:
        """All bytes of one version; (bytes sent by all, bytes per receiver), the same on every rank.

        version: None moves as many bytes and writes none.
        """
        urls = tuple(session.states)
        places = {r: group.members.first_of(r.engine) + r.rank for r in wire.plan.receivers}
        alive = set(on_main(lambda: [call.url for call in session.calls]))
        links = [x for x in self._links[wire.fingerprint] if urls[x.receiver.engine] in alive]
        asked: dict[str, Any] = {
            "plan": wire.fingerprint,
            "group": group.name,
            "timeout_s": self._options.timeout_s,
            "write": version is not None,
        }
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(at_once, session.calls, lambda call: call.ours("receive", asked, version))
            sent = send(links, mine, group.group, places, self._options.timeout_s, packed=version is not None)
            everyone: list[SentTo] = sum(gathered(sent), [])
            outcomes = answers.result()
        received: dict[str, int] = {}
        for url, answer in outcomes.items():
            if isinstance(answer, EngineError):
                told = [x.failure for x in everyone if x.failure and urls[x.receiver.engine] == url]
                error = (
                    answer
                    if isinstance(answer, RankFailure)
                    else EngineError("; ".join([str(answer), *told]))
                )
                session.drop(url, error, written=version is not None)
                continue
            for number, rank in enumerate(answer):
                received[f"{url} rank {number}"] = rank["bytes"]
        return sum(x.bytes for x in everyone), on_main(lambda: received)

    def close(self) -> None:
        """See `WeightSync.close`."""
        self._membership.close()
