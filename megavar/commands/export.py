"""`megavar export RUN_DIR|CHECKPOINT OUT`: a trained model as a complete Hugging Face directory, reloaded as a check.

A run holds its models as such directories already: they are copied file by file, without Megatron. A checkpoint of
`megavar import` is loaded whole, in this process.
"""

from __future__ import annotations

import argparse
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megavar.commands.checkpoint import COMPANIONS, MANIFEST, WEIGHTS, load_weights, read_manifest
from megavar.commands.ranks import check_new_directory
from megavar.config.load import load_recipe
from megavar.data.suggest import did_you_mean
from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.models.companions import copy_companions
from megavar.models.hf_files import check_hf_directory, split_into_files, write_index
from megavar.runs import phase_status


def run(args: argparse.Namespace) -> int:
    """Write and check `args.out`; raises UserError for bad input."""
    source, out, limit = args.source, args.out, int(args.shard_gib * 2**30)
    if (source / "recipe.toml").is_file():
        found = arm_directory(source, args.arm)
        check_new_directory(out)
        copy_model(found, out, max_shard_bytes=limit)
    elif (source / MANIFEST).is_file():
        if args.arm is not None:
            raise UserError(
                f"--arm {args.arm}: {source} is a checkpoint, it holds one model; leave --arm out"
            )
        manifest = read_manifest(source)
        check_new_directory(out)
        export_checkpoint(source, out, dtype=manifest.dtype, max_shard_bytes=limit)
        _reload(out)
    else:
        raise UserError(
            f"{source} is neither a run directory (recipe.toml) nor a checkpoint of `megavar import` ({MANIFEST})"
        )
    files = sorted(out.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 2**30
    print(f"{out}: {len(files)} safetensors files, {size:.3g} GiB; transformers loads every weight")
    return 0


def arm_directory(run_directory: Path, name: str | None) -> Path:
    """The Hugging Face directory of a finished fit: `initial`, `posterior` or an arm's name; of online rounds the last.

    None is the arm of a run that has one. Raises UserError for an unknown or unfinished one.
    """
    recipe = load_recipe(run_directory / "recipe.toml")
    arms = [arm.name for arm in recipe.arms]
    if name is None:
        if len(arms) != 1:
            raise UserError(f"{run_directory} has several arms; choose one by --arm: {', '.join(arms)}")
        name = arms[0]
    phases = {"initial": "initial/fit", "posterior": "posterior/fit"} | {a: f"arms/{a}/fit" for a in arms}
    if recipe.rounds > 1:
        last = f"rounds/{recipe.rounds:03}"
        phases |= {"posterior": f"{last}/posterior/fit", arms[0]: f"{last}/policy/fit"}
    if name not in phases:
        raise UserError(f"--arm {name}: {run_directory} has no such arm; {did_you_mean(name, phases)}")
    phase = run_directory / phases[name]
    status, manifest = phase_status(phase)
    if manifest is None:
        raise UserError(f"{phase}: {status}; run `megavar run` on its recipe again to finish it")
    return phase / "hf"


def copy_model(source: Path, out: Path, *, max_shard_bytes: int) -> None:
    """Copy a Hugging Face directory into weight files of at most `max_shard_bytes`, one in memory at a time.

    A tensor larger than that has a file of its own. `out` appears under its name once transformers has loaded it.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = check_hf_directory(source, read_architecture(source)).tensors
    sizes = {name: stored.stop - stored.start for name, stored in tensors.items()}
    files = split_into_files(sizes, max_shard_bytes)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    copy_companions(source, partial)
    for name, names in files.items():
        with ExitStack() as stack:
            opened: dict[Path, Any] = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in {tensors[tensor].file for tensor in names}
            }
            content = {tensor: opened[tensors[tensor].file].get_tensor(tensor) for tensor in names}
            save_file(content, partial / name, metadata={"format": "pt"})
        shutil.copymode(partial / "config.json", partial / name)
    write_index(partial, files, sum(sizes.values()))
    _reload(partial)
    os.replace(partial, out)


def _reload(out: Path) -> None:
    from transformers.utils import logging

    import megavar.parallel  # noqa: F401  before Megatron, which the next line imports
    from megavar.models.hf_export import verify_export

    logging.disable_progress_bar()
    verify_export(out, load=True)


def export_checkpoint(source: Path, out: Path, *, dtype: str, max_shard_bytes: int) -> None:
    """Export a checkpoint of `megavar import`, whatever its layout, in this process and in host memory."""
    # The reload check needs the model in host memory too, and no accelerator may be large or free enough.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch.distributed as dist

    from megavar.models.parallel_layout import ParallelLayout
    from megavar.parallel.groups import initialize

    groups = initialize(ParallelLayout())
    # After megavar.parallel, which adapts Megatron to a machine without CUDA.
    from megavar.models.build import build_model, transformer_config
    from megavar.models.hf_export import export_hf
    from megavar.trainer.model import DTYPES

    architecture = read_architecture(source / COMPANIONS)
    config = transformer_config(architecture, groups, dtype=DTYPES[dtype])
    [module] = build_model(architecture, config, groups)
    load_weights(module, source / WEIGHTS)
    export_hf([module], architecture, source / COMPANIONS, out, max_shard_bytes=max_shard_bytes)
    dist.destroy_process_group()
