"""Engines on the trainer's own machine map its memory and copy exactly their ranges out of it; no process group.

On a CPU, and where weights are converted on the way, each rank packs its messages into a shared buffer, a round of
messages at a time; engines copy a round while the next one is packed. On a GPU they read the parameters themselves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megavar.errors import UserError
from megavar.models.parallel_layout import ParallelLayout
from megavar.rollout.control import EngineError
from megavar.sync.collective import gathered, gathered_on_main, on_main
from megavar.sync.engine_plugin.megavar_sync_engine.boxes import encode
from megavar.sync.engine_plugin.megavar_sync_engine.mapped import SLOTS, machine
from megavar.sync.engines import EngineCalls, RankFailure, at_once, planned_layout
from megavar.sync.instruct import instruct
from megavar.sync.memory import SharedBuffer, cuda_handle
from megavar.sync.plan import Receiver, plan
from megavar.sync.sender import Outgoing, Source, outgoing
from megavar.sync.session import Session, parameters
from megavar.sync.transport import SyncOptions, SyncReport
from megavar.sync.verify import verify_engines
from megavar.sync.wire import Wire

_ALIGN = 64

Offer = dict[str, Any]
"""What a receiver needs to read one sender's memory; see the plugin's `mapped.attach`."""


class ColocatedSync:
    """See `megavar.sync.transport.open_sync`. The shared buffer lives on between pushes."""

    def __init__(self, options: SyncOptions) -> None:
        self._options = options
        self._buffer: SharedBuffer | None = None
        self._links: dict[str, list[Outgoing]] = {}

    def push(
        self,
        model_chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        version: str,
        *,
        verify: bool = True,
    ) -> SyncReport:
        """See `WeightSync.push`. Raises UserError where a server runs on another machine than a trainer rank."""
        with Session(self._options, version) as session:
            engine = planned_layout(self._options.architecture, session.states)
            moves = plan(self._options.architecture, layout, engine, len(session.states))
            mine, device = parameters(model_chunks, moves.table)
            wire = Wire(moves, self._options.bucket_bytes)
            self._instruct(session, wire)
            links = self._links[wire.fingerprint]
            memory: _Staged | _Exported
            if device.type == "cuda" and engine.dtype != "fp8":
                memory = _Exported(links, mine)
            else:
                memory = _Staged(links, mine, self._buffer_of(_Staged.size(links), device))
            self._offer(session, wire, memory)
            session.begin()
            began = time.perf_counter()
            received = self._transfer(session, wire, memory, version)
            transferred = time.perf_counter() - began
            session.conclude()
            if verify:
                verify_engines(session, mine, wire)
            return SyncReport(
                transport="colocated",
                version=version,
                seconds=session.seconds,
                transfer_seconds=transferred,
                sent_bytes=sum(received.values()),
                received_bytes=received,
                failed=session.failed,
                verified=verify,
            )

    def _instruct(self, session: Session, wire: Wire) -> None:
        """Every server knows the plan, and is where the trainer's ranks are."""
        ranks = gathered(machine())

        def known() -> bool:
            everywhere = True
            asked = {"plan": wire.fingerprint}
            for url, answer in at_once(session.calls, lambda call: call.ours("greet", asked)).items():
                if isinstance(answer, EngineError):
                    raise answer
                for number, rank in enumerate(answer):
                    for trainer in (n for n, place in enumerate(ranks) if place != rank["machine"]):
                        raise UserError(
                            f"{url} rank {number} runs on another machine than trainer rank {trainer}: transport "
                            "colocated copies within one; use transport direct"
                        )
                    everywhere = everywhere and rank["known"]
            return everywhere

        if not on_main(known):
            instruct(session, wire)
        if wire.fingerprint not in self._links:
            self._links[wire.fingerprint] = outgoing(wire, dist.get_rank())

    def _buffer_of(self, size: int, device: torch.device) -> SharedBuffer:
        if self._buffer is None or self._buffer.data.numel() < size:
            self.close()
            self._buffer = SharedBuffer(max(size, 1), device)
        return self._buffer

    def _offer(self, session: Session, wire: Wire, memory: _Staged | _Exported) -> None:
        """Every server maps what its ranks will read. Raises UserError on every rank where one cannot."""
        urls = tuple(session.states)
        parts = gathered_on_main(memory.offers())

        def one(call: EngineCalls) -> None:
            ranks: list[dict[int, Offer]] = [{} for _ in range(wire.plan.engine.tp)]
            for sender, offers in enumerate(parts):
                for receiver, offer in offers.items():
                    if urls[receiver.engine] == call.url:
                        ranks[receiver.rank][sender] = offer
            call.ours("map", {"plan": wire.fingerprint, "ranks": ranks})

        def tell() -> None:
            for url, answer in at_once(session.calls, one).items():
                if isinstance(answer, RankFailure):
                    raise UserError(str(answer))
                if isinstance(answer, EngineError):
                    session.drop(url, answer)

        on_main(tell)

    def _transfer(
        self, session: Session, wire: Wire, memory: _Staged | _Exported, version: str
    ) -> dict[str, int]:
        """All rounds of one version; bytes per receiver, the same on every rank."""
        main = dist.get_rank() == 0
        rounds = max(gathered(memory.rounds))
        received: dict[str, int] = {}
        answer: Future | None = None

        def copy(number: int) -> dict[str, list[Any] | EngineError]:
            asked = {"plan": wire.fingerprint, "round": number, "last": number == rounds - 1}
            said = version if asked["last"] else None
            return at_once(list(session.calls), lambda call: call.ours("copy", asked, said))

        with ThreadPoolExecutor(1) as pool:
            for number in range(rounds):
                memory.stage(number)  # its slot was acknowledged before the last barrier
                if main:
                    self._settle(session, answer, number - 1, received)
                dist.barrier()
                if main:
                    answer = pool.submit(copy, number)
            if main:
                self._settle(session, answer, rounds - 1, received)
        return on_main(lambda: received)

    def _settle(self, session: Session, answer: Future | None, number: int, received: dict[str, int]) -> None:
        """Rank 0: wait until every server has copied round `number`; those that failed drop out."""
        for url, result in (answer.result() if answer else {}).items():
            if isinstance(result, EngineError):
                torn = EngineError(str(result)) if number else result  # of earlier rounds it has every byte
                session.drop(url, torn, written=True)
                for receiver in [r for r in received if r.startswith(f"{url} ")]:
                    del received[receiver]
                continue
            for place, rank in enumerate(result):
                receiver = f"{url} rank {place}"
                received[receiver] = received.get(receiver, 0) + rank["bytes"]

    def close(self) -> None:
        """See `WeightSync.close`."""
        if self._buffer is not None:
            self._buffer.close()
        self._buffer = None


class _Staged:
    """Messages packed into slots of a shared buffer."""

    def __init__(self, links: Sequence[Outgoing], mine: Mapping[str, Tensor], buffer: SharedBuffer) -> None:
        self._links, self._buffer = links, buffer
        self._sources = [Source(link, mine) for link in links]
        self._slot_bytes = self.size(links) // SLOTS

    @staticmethod
    def size(links: Sequence[Outgoing]) -> int:
        """Bytes of a buffer for them."""
        return SLOTS * sum(map(_room, links))

    @property
    def rounds(self) -> int:
        return max((len(link.buckets) for link in self._links), default=0)

    def offers(self) -> dict[Receiver, Offer]:
        found: dict[Receiver, Offer] = {}
        at = 0
        for link in self._links:
            found[link.receiver] = {
                "memories": [self._buffer.handle],
                "slot_bytes": self._slot_bytes,
                "at": at,
            }
            at += _room(link)
        return found

    def stage(self, number: int) -> None:
        """Pack message `number` of every link into its slot."""
        at = number % SLOTS * self._slot_bytes
        for link, source in zip(self._links, self._sources, strict=True):
            for bucket in link.buckets[number : number + 1]:
                source.fill(bucket, self._buffer.data[at : at + link.bytes(bucket)])
            at += _room(link)
        if self._buffer.data.is_cuda:
            torch.cuda.synchronize(self._buffer.data.device)


class _Exported:
    """The parameters themselves, on a GPU."""

    rounds = 1

    def __init__(self, links: Sequence[Outgoing], mine: Mapping[str, Tensor]) -> None:
        self._links, self._mine = links, mine

    def offers(self) -> dict[Receiver, Offer]:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._mine.values()}
        numbers = {pointer: number for number, pointer in enumerate(storages)}
        memories = [cuda_handle(storage) for storage in storages.values()]
        found: dict[Receiver, Offer] = {}
        for link in self._links:
            tensors = [self._mine[name] for name in link.names]
            lines = [(bucket.number, *box) for bucket in link.buckets for box in bucket.boxes]
            found[link.receiver] = {
                "memories": memories,
                "parameters": [
                    (
                        numbers[t.untyped_storage().data_ptr()],
                        t.storage_offset() * t.element_size(),
                        t.numel() * t.element_size(),
                        str(t.dtype).removeprefix("torch."),
                    )
                    for t in tensors
                ],
                "boxes": encode(np.array(lines, dtype=np.int64)),
            }
        return found

    def stage(self, number: int) -> None:
        torch.cuda.synchronize()


def _room(link: Outgoing) -> int:
    """Bytes of a slot for its largest message."""
    return -(-max(map(link.bytes, link.buckets)) // _ALIGN) * _ALIGN
