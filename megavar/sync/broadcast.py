"""Gather and broadcast: whole Hugging Face tensors meet on rank 0, bucket by bucket, and go to every engine rank.

The transport that every SGLang understands, and the reference for `direct`: each receiver gets the whole model and
SGLang's own loader cuts it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megavar.errors import UserError
from megavar.models.families import layout_table
from megavar.models.gather import find_holders, gather
from megavar.models.parallel_layout import ParallelLayout
from megavar.models.shards import local_shards
from megavar.rollout.control import EngineError
from megavar.sync.collective import on_main
from megavar.sync.engines import at_once, planned_layout
from megavar.sync.group import EngineGroup, Members, Membership
from megavar.sync.plan import plan
from megavar.sync.session import Session, parameters
from megavar.sync.transport import SyncOptions, SyncReport
from megavar.sync.verify import verify_engines
from megavar.sync.wire import Wire


class BroadcastSync:
    """See `megavar.sync.transport.open_sync`."""

    def __init__(self, options: SyncOptions) -> None:
        self._options = options
        self._membership = Membership(host=options.host, timeout_s=options.timeout_s)

    def push(
        self,
        model_chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        version: str,
        *,
        verify: bool = True,
    ) -> SyncReport:
        """See `WeightSync.push`. A server that fails breaks the broadcast for all: then none arrives."""
        table = layout_table(self._options.architecture)
        with Session(self._options, version) as session:
            engine = planned_layout(self._options.architecture, session.states)
            if engine.dtype == "fp8":
                raise UserError(
                    f"{next(iter(session.states))} serves fp8 and broadcast sends whole tensors unquantised; use "
                    "transport direct or colocated"
                )
            mine = {s.tensor.name: s for s in local_shards(model_chunks, table)}
            device = next(iter(mine.values())).parameter.device
            members = Members(1, tuple((url, engine.tp) for url in session.states))
            group = self._membership.of(members, session.calls, device)
            session.begin()
            began = time.perf_counter()
            whole = gather([t for t in table.tensors if not t.tied_copy], 0, mine, find_holders(mine))
            sent = 0
            if dist.get_rank() == 0:
                dtype = getattr(torch, engine.dtype)
                sent = self._broadcast(
                    session, group, _buckets(whole, dtype, self._options.bucket_bytes), version
                )
            for _ in whole:  # what is left after a failure, and all of it on other ranks
                pass
            transferred = time.perf_counter() - began
            arrived = session.conclude(self._membership)
            sent = on_main(lambda: sent)
            if verify:
                moves = plan(self._options.architecture, layout, engine, len(session.states))
                shards, _ = parameters(model_chunks, table)
                verify_engines(session, shards, Wire(moves, self._options.bucket_bytes))
            receivers = [f"{url} rank {rank}" for url in arrived for rank in range(engine.tp)]
            return SyncReport(
                transport="broadcast",
                version=version,
                seconds=session.seconds,
                transfer_seconds=transferred,
                sent_bytes=sent * len(receivers),
                received_bytes=dict.fromkeys(receivers, sent),
                failed=session.failed,
                verified=verify,
            )

    def _broadcast(
        self,
        session: Session,
        group: EngineGroup,
        buckets: Iterable[list[tuple[str, Tensor]]],
        version: str,
    ) -> int:
        """Rank 0: send all buckets; bytes of one copy. The version goes with the last."""
        sent, number = 0, 0
        held: list[tuple[str, Tensor]] | None = None
        with ThreadPoolExecutor(1) as pool:
            for bucket in _with_end(buckets):
                if held is not None:
                    size = self._one(session, group, pool, held, number, None if bucket else version)
                    if not session.calls:
                        return sent
                    sent, number = sent + size, number + 1
                held = bucket
        return sent

    def _one(
        self,
        session: Session,
        group: EngineGroup,
        pool: ThreadPoolExecutor,
        bucket: list[tuple[str, Tensor]],
        number: int,
        version: str | None,
    ) -> int:
        names = [name for name, _ in bucket]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket]
        shapes = [list(tensor.shape) for _, tensor in bucket]
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        answers: Future = pool.submit(
            at_once,
            session.calls,
            lambda call: call.load_bucket(group.name, names, dtypes, shapes, version),
        )
        trouble = ""
        try:
            work = group.group.broadcast(flat, 0)
            work.wait(timedelta(seconds=self._options.timeout_s))
        except RuntimeError as error:  # torch.distributed raises nothing more telling
            trouble = f"; rank 0 could not send it: {str(error).splitlines()[0]}"
        failed = {url: a for url, a in answers.result().items() if isinstance(a, EngineError)}
        if failed or trouble:
            where = f"bucket {number} ({names[0]} and on) of {version or 'an update'}"
            for call in list(session.calls):
                told = failed.get(call.url, "another member of the group failed")
                session.drop(call.url, EngineError(f"{call.url}: {where}: {told}{trouble}"), written=True)
        return flat.numel()

    def close(self) -> None:
        """See `WeightSync.close`."""
        self._membership.close()


def _buckets(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, limit: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors in `dtype`, together at most `limit` bytes; one that is larger has a bucket of its own."""
    held: list[tuple[str, Tensor]] = []
    room = limit
    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if held and size > room:
            yield held
            held, room = [], limit
        held.append((name, tensor.to(dtype)))
        room -= size
    if held:
        yield held


def _with_end(items: Iterable[list]) -> Iterator[list | None]:
    """The items, then None: whoever is one behind knows the last."""
    yield from items
    yield None
