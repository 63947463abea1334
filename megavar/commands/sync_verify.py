"""`megavar sync verify`: whether running servers hold, bit for bit, the weights stored here."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from megavar.commands.ranks import run_on_ranks
from megavar.commands.stored import find_stored
from megavar.commands.sync import trainer_layout
from megavar.errors import UserError
from megavar.models.architecture import read_architecture


def run(args: argparse.Namespace) -> int:
    """Returns 0 where every tensor of every server is equal; raises UserError that names the first difference."""
    stored = find_stored(args.source, args.model)
    layout = trainer_layout(args.trainer)
    read_architecture(stored.hf).check_layout(layout)
    return run_on_ranks(
        "megavar.commands.sync_verify",
        args.source,
        ranks=layout.ranks,
        hf=str(args.model) if args.model else None,
        layout=asdict(layout),
        engines=args.engine,
    )


def main(path: Path, *, hf: str | None, layout: dict[str, int], engines: list[str]) -> None:
    """Load `path` and compare; called on every rank."""
    import torch.distributed as dist

    from megavar.commands.reshard import engine_errors, running_servers
    from megavar.commands.stored import load_stored
    from megavar.models.parallel_layout import ParallelLayout
    from megavar.parallel.groups import initialize
    from megavar.sync.verify import verify_servers

    groups = initialize(ParallelLayout(**layout))
    servers = running_servers(engines)
    chunks, architecture = load_stored(find_stored(path, Path(hf) if hf else None), groups)
    with engine_errors():
        difference = verify_servers(architecture, servers, chunks, groups.layout)
    if difference is not None:
        raise UserError(f"{path}: not what is served: {difference}")
    if groups.is_main:
        print(f"{path}: every tensor of {len(engines)} server(s) is equal, bit for bit")
    dist.destroy_process_group()
