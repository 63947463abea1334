"""Stored weights to running engines, to a Hugging Face directory, or to a checkpoint: the ranks of tools/reshard.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megavar.commands.checkpoint import write_checkpoint
from megavar.commands.stored import Stored, find_stored, load_stored
from megavar.errors import UserError
from megavar.models.parallel_layout import ParallelLayout

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel

    from megavar.parallel.groups import Groups
    from megavar.rollout.servers import ExternalServers
    from megavar.sync.transport import Transport


def main(
    path: Path,
    *,
    hf: str | None,
    layout: dict[str, int],
    engines: list[str],
    transport: Transport,
    version: str,
    directory: str | None,
    host: str,
    to_hf: str | None,
    to_checkpoint: str | None,
    verify: bool,
) -> None:
    """Load `path` under the layout and bring it where it is to go; called on every rank."""
    import torch.distributed as dist

    from megavar.parallel.groups import initialize
    from megavar.progress import Progress

    groups = initialize(ParallelLayout(**layout))
    servers = running_servers(engines) if engines else None
    stored = find_stored(path, Path(hf) if hf else None)
    progress = Progress(enabled=groups.is_main)
    with progress.phase("load"):
        chunks, architecture = load_stored(stored, groups)
    if engines:
        from megavar.sync.transport import open_sync

        sync = open_sync(
            transport,
            architecture,
            servers,
            hf_directory=stored.hf,
            directory=Path(directory) if directory else None,
            host=host,
        )
        with progress.phase(f"push ({transport})"), engine_errors():
            report = sync.push(chunks, groups.layout, version, verify=verify)
        sync.close()
        for receiver, size in report.received_bytes.items():
            _say(f"{receiver}: {size} bytes")
        for url, why in report.failed.items():
            _say(f"{url}: FAILED: {why}")
        checked = ", every tensor compared" if report.verified else ""
        _say(f"{transport}: version {version!r} in {report.seconds:.2f} s{checked}")
        if report.failed:
            raise UserError(
                f"{len(report.failed)} of {len(engines)} servers do not serve version {version!r}"
            )
    if to_hf:
        from megavar.models.hf_export import export_hf

        with progress.phase("write"):
            export_hf(chunks, architecture, stored.hf, to_hf)
        _say(f"{to_hf}: written")
        if verify:
            with progress.phase("read back"):
                _compare(Stored(Path(to_hf), Path(to_hf), True), chunks, groups)
    if to_checkpoint:
        with progress.phase("write"):
            write_checkpoint(chunks, stored.hf, Path(to_checkpoint), groups)
        _say(f"{to_checkpoint}: written for {_sizes(groups.layout)}; it loads under any layout")
        if verify:
            with progress.phase("read back"):
                _compare(find_stored(Path(to_checkpoint), None), chunks, groups)
    dist.barrier()
    dist.destroy_process_group()


def running_servers(urls: list[str]) -> ExternalServers | None:
    """On rank 0, which alone talks to them; collective. Raises UserError on every rank where one does not answer."""
    from megavar.rollout.servers import ExternalServers
    from megavar.sync.collective import on_main

    opened: list[ExternalServers] = []
    on_main(lambda: opened.append(ExternalServers(urls)))
    return opened[0] if opened else None


@contextmanager
def engine_errors() -> Iterator[None]:
    """What a server refused or did not answer is the user's to mend: raised as UserError."""
    from megavar.rollout.control import EngineError

    try:
        yield
    except EngineError as error:
        raise UserError(str(error)) from None


def _compare(written: Stored, chunks: list[GPTModel], groups: Groups) -> None:
    """Read back what was written and compare every element; collective. Raises UserError on every rank."""
    from megavar.sync.collective import gathered

    again, _ = load_stored(written, groups)
    differ = [
        name
        for mine, theirs in zip(chunks, again, strict=True)
        for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True)
        if not _same_bits(one, other)
    ]
    for rank, names in enumerate(gathered(differ)):
        if names:
            raise UserError(
                f"{written.weights}: {names[0]} of rank {rank} differs from what was to be written"
            )
    _say(f"{written.weights}: every element read back and compared")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(
        one.detach().view(integers), other.detach().view(integers)
    )


def _sizes(layout: ParallelLayout) -> str:
    names = ("tp", "pp", "vpp", "cp", "ep", "etp")
    return ", ".join(f"{n}={getattr(layout, n)}" for n in names if getattr(layout, n) > 1) or "one rank"


def _say(line: str) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(line, flush=True)
