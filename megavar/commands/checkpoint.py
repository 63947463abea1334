"""What `megavar import` writes and `megavar export` reads: a model as a Megatron distributed checkpoint.

    <checkpoint>/import.json   layout and type of the weights, and the size of every file
    <checkpoint>/weights/      torch_dist shards
    <checkpoint>/hf/           config, generation settings, tokenizer and chat template, byte for byte

Weights only: optimizer state belongs to `megavar.trainer.checkpoint`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megavar.errors import UserError
from megavar.models.companions import copy_companions

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from megavar.parallel.groups import Groups

MANIFEST = "import.json"
WEIGHTS = "weights"
COMPANIONS = "hf"


class Manifest(NamedTuple):
    tp: int
    pp: int
    dtype: str
    """Of the parameters: "float32" or "bfloat16"."""
    files: dict[str, int]
    """Every other file of the checkpoint -> its size in bytes."""


def write_manifest(checkpoint: Path, *, tp: int, pp: int, dtype: str) -> None:
    """The last file of a checkpoint: all others must be complete."""
    files = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in _files(checkpoint)}
    manifest = Manifest(tp=tp, pp=pp, dtype=dtype, files=files)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest._asdict(), indent=1) + "\n", encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises UserError where it, or a file it names, is missing, truncated or damaged."""
    path = checkpoint / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); import the model again") from None
    sizes = {p.relative_to(checkpoint).as_posix(): p.stat().st_size for p in _files(checkpoint)}
    for name, size in manifest.files.items():
        if name not in sizes:
            raise UserError(f"{checkpoint / name} is missing; import the model again")
        if sizes[name] != size:
            raise UserError(
                f"{checkpoint / name} has {sizes[name]} bytes instead of {size}; import the model again"
            )
    return manifest


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)


def write_checkpoint(chunks: Sequence[GPTModel], hf: Path, out: Path, groups: Groups) -> None:
    """The parameters of all chunks of all ranks, with the companions of `hf`, appear as `out` when all is there;
    collective."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    partial = out.parent / f".{out.name}.partial"
    if groups.is_main:
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        (partial / WEIGHTS).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": sharded(chunks)}, str(partial / WEIGHTS))
    dist.barrier()
    if groups.is_main:
        copy_companions(hf, partial / COMPANIONS)
        dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
        write_manifest(partial, tp=groups.tp, pp=groups.pp, dtype=dtype)
        os.replace(partial, out)
    dist.barrier()


def load_weights(module: GPTModel, directory: Path) -> None:
    """Fill this rank's parameters, under any layout; collective."""
    from megatron.core import dist_checkpointing

    from megavar.models.sharded import load_parameters

    state = dist_checkpointing.load({"model": sharded([module])}, str(directory))
    load_parameters(module, state["model"][0])


def sharded(chunks: Sequence[GPTModel]) -> dict[int, dict]:
    """Megatron's description of all parameters, for saving and for loading.

    What is stored is named by its place in the whole model, not by its chunk.
    """
    from megatron.core import parallel_state

    from megavar.models.sharded import sharded_parameters

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "singleton_local_shards": False}
    return {index: sharded_parameters(chunk, metadata) for index, chunk in enumerate(chunks)}
