"""The one interface of all transports: push the trainer's weights to every engine, as one version or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from megavar.errors import UserError
from megavar.models.architecture import Architecture
from megavar.models.parallel_layout import ParallelLayout
from megavar.rollout.control import EngineError, PauseMode
from megavar.rollout.servers import Servers

Transport = Literal["disk", "broadcast", "direct", "colocated"]
TRANSPORTS: tuple[Transport, ...] = ("disk", "broadcast", "direct", "colocated")


class SyncError(EngineError):
    """No engine took the new weights, or one holds other bytes than the trainer. Raised on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one push did; the same on every rank."""

    transport: Transport
    version: str
    seconds: float
    """Of the whole push, verification included."""
    transfer_seconds: float
    """From the first byte that is gathered, packed or read by an engine, to the last that is in place."""
    sent_bytes: int
    """Over all senders; what a file system or a tree of broadcasts moved counts once per receiver."""
    received_bytes: dict[str, int] = field(default_factory=dict)
    """Receiver ("<url> rank <tensor-parallel rank>") -> bytes that arrived there."""
    failed: dict[str, str] = field(default_factory=dict)
    """Server URL -> why it does not serve this version; it is out of service."""
    verified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """What every transport is opened with, by `open_sync`."""

    architecture: Architecture
    servers: Servers | None
    """On rank 0, which alone talks to them; None on the others."""
    bucket_bytes: int
    """Bound of every buffer."""
    timeout_s: float
    """A peer that makes no progress for this long has failed."""
    pause_mode: PauseMode
    """What becomes of requests in flight while weights are swapped."""
    host: str
    """Of rank 0, as the engines reach it."""


class WeightSync(Protocol):
    """Open for as long as trainer and engines live; every method is collective over the trainer's ranks."""

    def push(
        self,
        model_chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        version: str,
        *,
        verify: bool = True,
    ) -> SyncReport:
        """Give all servers the weights of `model_chunks` and resume them.

        model_chunks: this rank's GPTModel chunks, wrapped or not. layout: how they are split over the ranks
        (`Groups.layout`); it may change from push to push. verify: compare checksums of every engine tensor
        with the trainer's.

        Raises SyncError on every rank when no server took the weights, or when verification finds a difference
        (it names server, rank, tensor and range). Servers that failed while others succeeded are in the report.
        """
        ...

    def close(self) -> None:
        """Leave the process groups; the servers stay as they are."""
        ...


def open_sync(
    transport: Transport,
    architecture: Architecture,
    servers: Servers | None,
    *,
    hf_directory: Path,
    directory: Path | None = None,
    bucket_bytes: int = 64 << 20,
    timeout_s: float = 600.0,
    pause_mode: PauseMode = "retract",
    host: str = "127.0.0.1",
) -> WeightSync:
    """A transport between this job's ranks and `servers`; collective. Nothing moves before the first push.

    hf_directory: a model of the same architecture, whose config and tokenizer belong to the weights. directory: where
    `disk` keeps the version that is served (required there). The others are those of `SyncOptions`.

    Raises UserError for an unknown transport or a missing directory.
    """
    options = SyncOptions(
        architecture=architecture,
        servers=servers,
        bucket_bytes=bucket_bytes,
        timeout_s=timeout_s,
        pause_mode=pause_mode,
        host=host,
    )
    match transport:
        case "disk":
            if directory is None:
                raise UserError("transport disk needs a directory that trainer and engines see")
            from megavar.sync.disk import DiskSync

            return DiskSync(options, hf_directory, directory)
        case "broadcast":
            from megavar.sync.broadcast import BroadcastSync

            return BroadcastSync(options)
        case "direct":
            from megavar.sync.direct import DirectSync

            return DirectSync(options)
        case "colocated":
            from megavar.sync.colocated import ColocatedSync

            return ColocatedSync(options)
    raise UserError(f"transport {transport!r} is unknown; expected one of {', '.join(TRANSPORTS)}")
