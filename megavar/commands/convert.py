"""Weights between a Megatron distributed checkpoint and a Hugging Face directory, tensor by tensor, in this process.

`megavar import` and `export` load a model on its ranks to do so; here nothing is loaded, so any machine will do. A
conversion that was killed goes on with the files it had finished and ends with the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from megavar.commands import fingerprint
from megavar.commands.checkpoint import COMPANIONS, WEIGHTS, write_manifest
from megavar.commands.fp8_blocks import Blocks, check_widths, quantization_config
from megavar.commands.ranks import check_new_directory
from megavar.commands.stored import Stored
from megavar.errors import UserError
from megavar.files import sha256
from megavar.memory import PeakMemory
from megavar.models.architecture import Architecture, Dtype, read_architecture
from megavar.models.companions import add_to_config, copy_companions, set_dtype
from megavar.models.families import layout_table
from megavar.models.hf_files import check_hf_directory, split_into_files, write_index
from megavar.models.hf_stream import as_bytes, read_stored, write_safetensors
from megavar.models.layout import LayoutTable
from megavar.models.megatron_files import METADATA, MegatronWeights, data_files
from megavar.models.megatron_stream import write_megatron
from megavar.models.parts import Parts


class Converted(NamedTuple):
    hf: Path
    """The Hugging Face directory of the two."""
    weights: Path
    """The Megatron checkpoint's data."""
    dtype: Dtype
    """Of the weights written."""
    partial: Path
    """Where what was written lies until `publish`."""
    kept: int
    """Files that an earlier, killed conversion had finished."""
    written_bytes: int
    largest_bytes: int
    """Of the largest Hugging Face tensor, in the wider of the two types."""
    peak_bytes: int
    """Memory in use at most, above that before the first tensor."""
    seconds: float
    blocks: int = 0
    """Of the weights written, those in fp8."""


class _Source(NamedTuple):
    """Where tensors are read from."""

    read: Callable[[str], torch.Tensor]
    """By Hugging Face's name, in the stored type."""
    dtype: Callable[[], Dtype]
    """Of all weights; see `MegatronWeights.dtype`."""
    itemsize: int
    state: list[Any]
    """Changes when the weights do."""


def to_hf(
    stored: Stored, out: Path, *, dtype: Dtype | None, max_file_bytes: int, fp8: bool = False
) -> Converted:
    """stored: a Megatron checkpoint and its config; with `fp8` also a Hugging Face directory. dtype: None keeps the
    stored one; with `fp8` it is that of what is not in blocks (`fp8_blocks`), bfloat16 where None.

    Raises UserError: bad input, before anything is written; weights that are not finite; a target that cannot be
    written.
    """
    architecture = read_architecture(stored.hf)
    if fp8:
        check_widths(architecture, stored.hf)
    table = layout_table(architecture)
    source = _source(stored, architecture, table)
    written: Dtype = dtype or ("bfloat16" if fp8 else source.dtype())
    check_new_directory(out)
    partial = _partial(out)
    target = getattr(torch, written)
    shapes = {s.name: s.shape for t in table.tensors if not t.tied_copy for s in t.sources}
    blocks = Blocks(table, source.read) if fp8 else None
    tensors = {
        name: blocks.forms(name, shape) if blocks and name in blocks.names else {name: (shape, target)}
        for name, shape in shapes.items()
    }
    sizes = {
        name: sum(math.prod(shape) * kind.itemsize for shape, kind in own.values())
        for name, own in tensors.items()
    }
    files = split_into_files(sizes, max_file_bytes)
    identity = {
        "to": "hf",
        "dtype": written,
        "fp8": fp8,
        "max_file_bytes": max_file_bytes,
        "source": source.state,
        "config": sha256(stored.hf / "config.json"),
    }

    def read(name: str) -> torch.Tensor:
        return blocks.read(name) if blocks and name in blocks else source.read(name).to(target)

    began = time.perf_counter()
    with _writing(partial):
        parts = Parts(partial, identity)
        kept = len(parts.kept)
        with PeakMemory() as memory:
            for file, names in files.items():
                in_file = {key: form for name in names for key, form in tensors[name].items()}
                parts.add(file, functools.partial(write_safetensors, tensors=in_file, read=read))
        copy_companions(stored.hf, partial)
        set_dtype(partial, written)
        if fp8:
            add_to_config(partial, {"quantization_config": quantization_config(architecture)})
        places = {file: [key for name in names for key in tensors[name]] for file, names in files.items()}
        write_index(partial, places, sum(sizes.values()))
    if not fp8:
        check_hf_directory(partial, architecture)
    width = max(target.itemsize, source.itemsize)
    return Converted(
        hf=partial,
        weights=stored.weights,
        dtype=written,
        partial=partial,
        kept=kept,
        written_bytes=sum(sizes.values()),
        largest_bytes=max(math.prod(shape) for shape in shapes.values()) * width,
        peak_bytes=memory.bytes,
        seconds=time.perf_counter() - began,
        blocks=len(blocks.names) if blocks else 0,
    )


def to_megatron(hf: Path, out: Path, *, dtype: Dtype | None, max_file_bytes: int) -> Converted:
    """A checkpoint as `megavar import` makes it: trainer, `reshard.py` and `export` read it under any layout.

    Raises UserError: bad input, before anything is written; a target that cannot be written.
    """
    architecture = read_architecture(hf)
    table = layout_table(architecture)
    tensors = check_hf_directory(hf, architecture).tensors
    written: Dtype = dtype or architecture.dtype
    if written not in ("float32", "bfloat16"):
        raise UserError(f"{hf}: its weights are {written}; choose --dtype float32 or --dtype bfloat16")
    for name, tensor in tensors.items():
        if dtype is None and tensor.dtype != written != "float32":
            raise UserError(
                f"{tensor.file}: {name} is {tensor.dtype}, but config.json says {written}; choose by --dtype"
            )
    check_new_directory(out)
    partial = _partial(out)
    target = getattr(torch, written)
    identity = {
        "to": "megatron",
        "dtype": written,
        "max_file_bytes": max_file_bytes,
        "source": [_state(file) for file in sorted({t.file for t in tensors.values()})],
        "config": sha256(hf / "config.json"),
    }
    began = time.perf_counter()
    with _writing(partial):
        parts = Parts(partial / WEIGHTS, identity)
        kept = len(parts.kept)
        with PeakMemory() as memory:
            write_megatron(parts, partial / WEIGHTS, table, tensors, target, max_file_bytes=max_file_bytes)
        shutil.rmtree(partial / COMPANIONS, ignore_errors=True)
        copy_companions(hf, partial / COMPANIONS)
    widths = [getattr(torch, stored.dtype).itemsize for stored in tensors.values()]
    counts = [torch.Size(stored.shape).numel() for stored in tensors.values()]
    return Converted(
        hf=hf,
        weights=partial / WEIGHTS,
        dtype=written,
        partial=partial,
        kept=kept,
        written_bytes=sum(counts) * target.itemsize,
        largest_bytes=max(counts) * max(target.itemsize, *widths),
        peak_bytes=memory.bytes,
        seconds=time.perf_counter() - began,
    )


def publish(converted: Converted, out: Path) -> None:
    """Let what was written appear under its name, complete, and say what it took."""
    with _writing(converted.partial):
        if converted.hf == converted.partial:
            Parts.forget(converted.partial)
        else:
            Parts.forget(converted.weights)
            write_manifest(converted.partial, tp=1, pp=1, dtype=converted.dtype)
        os.replace(converted.partial, out)
    kept = f", {converted.kept} files of an earlier start kept" if converted.kept else ""
    kinds = f"fp8 ({converted.blocks} weights) and {converted.dtype}" if converted.blocks else converted.dtype
    mib = 2**20
    print(
        f"{out}: {converted.written_bytes / mib:.1f} MiB in {kinds}, {converted.seconds:.1f} s{kept}; peak "
        f"memory {converted.peak_bytes / mib:.1f} MiB, {converted.peak_bytes / converted.largest_bytes:.2f} x the "
        f"largest tensor"
    )


def verify(converted: Converted) -> None:
    """Compare every tensor and, where one model fits in free memory, the logits; prints what was compared.

    Raises UserError where they differ; what was written then stays under its partial name.
    """
    print(f"verify: {compare_tensors(converted)} tensors read back, checksums equal", flush=True)
    need, free = fingerprint.bytes_needed(converted.hf), psutil.virtual_memory().available
    if need > free:
        print(
            f"verify: logits are not compared: that takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            flush=True,
        )
        return
    found = fingerprint.compare_logits(converted.hf, converted.weights)
    print(
        f"verify: logits of transformers and Megatron differ by {found.largest_difference:.2g} at most (largest logit "
        f"{found.largest_logit:.3g}); the likeliest token is the same at {found.same_argmax:.1%} of positions",
        flush=True,
    )


def compare_tensors(converted: Converted) -> int:
    """Read every tensor back from both sides, as the type written; returns how many.

    Compared are SHA-256 checksums, so that one tensor is in memory at a time. Raises UserError naming the first
    that differs.
    """
    architecture = read_architecture(converted.hf)
    table = layout_table(architecture)
    weights = MegatronWeights(converted.weights, table)
    tensors = check_hf_directory(converted.hf, architecture).tensors
    dtype = getattr(torch, converted.dtype)
    count = 0
    for tensor in table.tensors:
        for number, source in enumerate(() if tensor.tied_copy else tensor.sources):
            if _digest(weights.read(tensor, number, dtype)) != _digest(
                read_stored(tensors[source.name]).to(dtype)
            ):
                raise UserError(
                    f"{converted.partial}: {source.name} differs from what it was converted from; "
                    f"is the disk sound? Remove {converted.partial} and convert again"
                )
            count += 1
    return count


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def _state(path: Path) -> list[Any]:
    """Changes when the file is written again; weights are too large to hash before each start."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]


def _source(stored: Stored, architecture: Architecture, table: LayoutTable) -> _Source:
    if stored.is_hf:
        tensors = check_hf_directory(stored.hf, architecture).tensors
        return _Source(
            read=lambda name: read_stored(tensors[name]),
            dtype=lambda: architecture.dtype,
            itemsize=max(getattr(torch, tensor.dtype).itemsize for tensor in tensors.values()),
            state=[_state(file) for file in sorted({tensor.file for tensor in tensors.values()})],
        )
    weights = MegatronWeights(stored.weights, table)
    homes = {s.name: (t, n) for t in table.tensors if not t.tied_copy for n, s in enumerate(t.sources)}
    files = [stored.weights / name for name in data_files(weights.metadata)]
    return _Source(
        read=lambda name: weights.read(*homes[name]),
        dtype=weights.dtype,
        itemsize=weights.itemsize,
        state=[sha256(stored.weights / METADATA), *map(_state, files)],
    )


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or partial}: {error.strerror}; mend it and run this again, it goes on with the "
            "files that are finished"
        ) from None
