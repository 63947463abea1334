"""Stored weights, whatever layout wrote them, to running SGLang servers, a Hugging Face directory or a checkpoint.

    reshard.py runs/a/arms/vr/fit/checkpoints --model Qwen3-4B --trainer tp=2,pp=2 \\
        --engine http://h1:30000 --engine http://h2:30000 --transport direct --verify
    reshard.py imported --trainer tp=4 --checkpoint imported-tp4 --verify
    reshard.py imported --hf out --verify
    reshard.py Qwen3-4B --trainer tp=2 --engine http://h1:30000 --dry-run

Under torchrun or srun this process is one of the ranks; otherwise they are started here.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path

from megavar.commands import sync
from megavar.commands.checkpoint import WEIGHTS
from megavar.commands.ranks import check_new_directory, run_on_ranks
from megavar.commands.stored import Stored, find_stored
from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.models.families import layout_table
from megavar.models.parallel_layout import ParallelLayout


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="of a fit or an import, or an HF directory"
    )
    parser.add_argument(
        "--model", type=Path, metavar="HF_DIR", help="config and tokenizer of a fit's checkpoint"
    )
    parser.add_argument("--trainer", default="tp=1", metavar="tp=N,...", help="layout of the sending ranks")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--engine", action="append", default=[], metavar="URL", help="a running server; repeatable"
    )
    target.add_argument("--hf", type=Path, metavar="OUT", help="new Hugging Face directory")
    target.add_argument(
        "--checkpoint", type=Path, metavar="OUT", help="new checkpoint, written under --trainer"
    )
    parser.add_argument("--transport", choices=("disk", "broadcast", "direct", "colocated"), default="direct")
    parser.add_argument("--version", help="that the servers will report; the checkpoint's name when left out")
    parser.add_argument("--directory", type=Path, help="of transport disk: seen by ranks and servers")
    parser.add_argument("--host", default="127.0.0.1", help="of rank 0, as the servers reach it")
    parser.add_argument("--verify", action="store_true", help="compare every element at the target")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Raises UserError for bad input before any rank is started."""
    stored = find_stored(args.source, args.model)
    layout = sync.trainer_layout(args.trainer)
    read_architecture(stored.hf).check_layout(layout)
    if args.transport == "disk" and args.engine and args.directory is None:
        raise UserError("--transport disk: name a directory that ranks and servers see by --directory")
    for out in (args.hf, args.checkpoint):
        if out is not None:
            check_new_directory(out)
    if args.dry_run:
        dry_run(args, stored.hf, layout)
        return 0
    return run_on_ranks(
        "megavar.commands.reshard",
        args.source,
        ranks=layout.ranks,
        hf=str(args.model) if args.model else None,
        layout=asdict(layout),
        engines=args.engine,
        transport=args.transport,
        version=args.version or version_of(args.source, stored),
        directory=str(args.directory.absolute()) if args.directory else None,
        host=args.host,
        to_hf=str(args.hf) if args.hf else None,
        to_checkpoint=str(args.checkpoint) if args.checkpoint else None,
        verify=args.verify,
    )


def version_of(source: Path, stored: Stored) -> str:
    """`step-000100` for a checkpoint of a fit, else the directory's own name."""
    inside = stored.is_hf or stored.weights.name == WEIGHTS
    return source.absolute().name if inside else stored.weights.absolute().name


def dry_run(args: argparse.Namespace, hf: Path, layout: ParallelLayout) -> None:
    """Print the plan for the servers as they are now, or what would be written."""
    architecture = read_architecture(hf)
    if not args.engine:
        tensors = layout_table(architecture).tensors
        count = sum(math.prod(s.shape) for t in tensors if not t.tied_copy for s in t.sources)
        print(
            f"{args.source}: {count} parameters ({architecture.family}) would be read under {args.trainer} "
            f"and written to {args.hf or args.checkpoint}"
        )
        return
    from megavar.commands.reshard import engine_errors
    from megavar.rollout.servers import ExternalServers
    from megavar.sync.engines import EngineCalls, planned_layout

    urls = ExternalServers(args.engine).servers()
    with engine_errors():
        engine = planned_layout(architecture, {url: EngineCalls(url, 60.0).state() for url in urls})
    sync.show_plan(hf, layout, engine, len(urls))


def main() -> None:
    try:
        status = run(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
