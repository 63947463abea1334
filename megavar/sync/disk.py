"""Weights by way of a file system: a Hugging Face directory per version, complete before any engine reads.

The slowest transport and the one with the fewest requirements: engines need no plugin unless verification is asked
for, and a directory remains from which a server that died comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megavar.errors import UserError
from megavar.files import write_atomically
from megavar.models.architecture import Architecture
from megavar.models.hf_export import export_hf
from megavar.models.parallel_layout import ParallelLayout
from megavar.rollout.control import EngineError
from megavar.sync.collective import on_main
from megavar.sync.transport import SyncError, SyncOptions, SyncReport
from megavar.sync.verify import verify_servers

MANIFEST = "weights.json"
"""Version of the weights and size of every file. Written last: a directory without it is not complete."""


class DiskSync:
    """See `megavar.sync.transport.open_sync`."""

    def __init__(self, options: SyncOptions, hf_directory: Path, directory: Path) -> None:
        self._options, self._source, self._directory = options, hf_directory, directory

    def push(
        self,
        model_chunks: Sequence[torch.nn.Module],
        layout: ParallelLayout,
        version: str,
        *,
        verify: bool = True,
    ) -> SyncReport:
        """See `WeightSync.push`. The version before is removed once all servers have the new one."""
        if not version or version != Path(version).name:
            raise UserError(f"version {version!r} cannot name a directory; use letters, digits, '-' and '_'")
        target = self._directory / version
        began = time.perf_counter()
        write_version(model_chunks, self._options.architecture, self._source, target, version)
        size, urls = on_main(lambda: self._load(target, version))
        transferred = time.perf_counter() - began
        if verify and (
            found := verify_servers(
                self._options.architecture,
                self._options.servers,
                model_chunks,
                layout,
                bucket_bytes=self._options.bucket_bytes,
                timeout_s=self._options.timeout_s,
            )
        ):
            raise SyncError(f"weights {version!r} differ after an update that reported success: {found}")
        on_main(lambda: _remove_others(target))
        return SyncReport(
            transport="disk",
            version=version,
            seconds=time.perf_counter() - began,
            transfer_seconds=transferred,
            sent_bytes=size * len(urls),
            received_bytes=dict.fromkeys(urls, size),
            verified=verify,
        )

    def _load(self, target: Path, version: str) -> tuple[int, list[str]]:
        servers = self._options.servers
        assert servers is not None, "rank 0 needs the servers"
        try:
            servers.update_weights(target, version, self._options.pause_mode)
        except EngineError as error:
            raise SyncError(f"weights {version!r} of {target}: {error}") from error
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        return size, servers.endpoints()

    def close(self) -> None:
        """See `WeightSync.close`. The last version stays on disk."""


def write_version(
    model_chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    source: Path,
    target: Path,
    version: str,
) -> None:
    """Write a Hugging Face directory that appears under its name with its manifest, or not at all; collective.

    Raises UserError on every rank, as `export_hf` does.
    """
    incoming = target.parent / f".{target.name}.incoming"
    on_main(lambda: shutil.rmtree(incoming, ignore_errors=True))
    export_hf(model_chunks, architecture, source, incoming)

    def finish() -> None:
        sizes = {
            p.relative_to(incoming).as_posix(): p.stat().st_size for p in incoming.rglob("*") if p.is_file()
        }
        manifest = {"version": version, "files": dict(sorted(sizes.items()))}
        write_atomically(incoming / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(incoming, target)

    on_main(finish)


def _remove_others(target: Path) -> None:
    """Other complete versions beside this one; anything else is not ours to remove."""
    for other in target.parent.iterdir():
        if other != target and (other / MANIFEST).is_file():
            shutil.rmtree(other)
