"""From a Hugging Face directory into this rank's Megatron parameters, reading only the slices it holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megavar.models.architecture import Architecture
from megavar.models.families import layout_table
from megavar.models.hf_files import HFDirectory, check_hf_directory
from megavar.models.shards import local_shards


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], architecture: Architecture, hf_dir: str | Path
) -> None:
    """Fills every parameter of this rank in place, casting to its dtype; vocabulary padding becomes zero.

    model_chunks: this rank's GPTModel chunks (one, or one per virtual stage), built from `architecture` under
    Megatron's current parallel state; Float16Module and DDP wrappers are looked through. An optimizer that
    keeps float32 copies must be built afterwards, or told by `reload_model_params`. Not collective.

    Raises UserError (see `check_hf_directory`) before any parameter is touched.
    """
    directory = check_hf_directory(hf_dir, architecture)
    shards = local_shards(model_chunks, layout_table(architecture))
    with torch.no_grad(), _Reader(directory) as reader:
        for shard in shards:
            names = [source.name for source in shard.tensor.sources]
            axis = shard.tensor.axis

            def read(
                source: int, start: int, stop: int, names: list[str] = names, axis: int = axis
            ) -> torch.Tensor:
                return reader.read(names[source], axis, start, stop)

            shard.tensor.shard_into(shard.parameter, read, shard.rank, shard.ranks)


class _Reader:
    """Slices of the directory's tensors; files are mapped, never read whole."""

    def __init__(self, directory: HFDirectory) -> None:
        self.directory = directory
        self.files: dict[Path, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def read(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        file = self.directory.tensors[name].file
        if file not in self.files:
            self.files[file] = self.stack.enter_context(safe_open(file, framework="pt"))
        view = self.files[file].get_slice(name)
        return view[start:stop] if axis == 0 else view[:, start:stop]
