"""`megavar import HF_DIR OUT`: a Hugging Face model as a Megatron distributed checkpoint (see checkpoint.py)."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from megavar.commands.checkpoint import write_checkpoint
from megavar.commands.ranks import check_model, check_new_directory, run_on_ranks
from megavar.errors import UserError
from megavar.models.parallel_layout import ParallelLayout


def run(args: argparse.Namespace) -> int:
    """Convert on the ranks of the layout; raises UserError for bad input before one starts."""
    architecture, layout = check_model(args.model, args)
    dtype = args.dtype or architecture.dtype
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"{args.model}: its weights are {dtype}; choose --dtype float32 or --dtype bfloat16")
    check_new_directory(args.out)
    return run_on_ranks(
        "megavar.commands.import_",
        args.out,
        ranks=layout.ranks,
        model=str(args.model),
        layout=asdict(layout),
        dtype=dtype,
    )


def main(path: Path, *, model: str, layout: dict[str, int], dtype: str) -> None:
    """Write the checkpoint `path`, which appears under its name when it is complete; called on every rank."""
    import torch.distributed as dist

    from megavar.parallel.groups import initialize
    from megavar.trainer.model import Settings, load_model

    groups = initialize(ParallelLayout(**layout))
    loaded = load_model(Path(model), groups, Settings(dtype=dtype))
    write_checkpoint(loaded.chunks, Path(model), path, groups)
    if groups.is_main:
        split = ", ".join(f"{name} {size}" for name, size in layout.items() if name != "ranks" and size > 1)
        print(
            f"{path}: {dtype} weights of {model}, written by {groups.world} ranks"
            + (f" ({split})" if split else "")
        )
    dist.barrier()
    dist.destroy_process_group()
