"""Which entries of the layout table this rank's parameters are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from megavar.models.layout import LayoutTable, TensorLayout, canonical_name


@dataclass(frozen=True, slots=True)
class LocalShard:
    """One parameter of this rank: shard `rank` of `ranks` of a tensor."""

    tensor: TensorLayout
    parameter: torch.nn.Parameter
    rank: int
    ranks: int
    replica: int
    """0 on one rank of all that hold the same shard for data parallelism."""


def local_shards(model_chunks: Sequence[torch.nn.Module], table: LayoutTable) -> list[LocalShard]:
    """Every parameter of this rank's chunks, in table order. Chunks may be wrapped (Float16Module, DDP).

    Raises ValueError for a parameter that the table does not know or that has another shape there: the model
    was not built from the table's architecture.
    """
    shards = {}
    for chunk in model_chunks:
        numbering = _Numbering(chunk)
        for name, parameter in chunk.named_parameters():
            canonical = numbering.globally(canonical_name(name))
            tensor = table.by_name.get(canonical)
            if tensor is None:
                raise ValueError(f"parameter {name} is not in the {table.architecture.family} layout table")
            shard = _place(tensor, parameter)
            if tuple(parameter.shape) != tensor.shard_shape(shard.ranks):
                raise ValueError(
                    f"parameter {name} has shape {tuple(parameter.shape)}, the layout table says "
                    f"{tensor.shard_shape(shard.ranks)}"
                )
            shards[tensor.name] = shard
    return [shards[tensor.name] for tensor in table.tensors if tensor.name in shards]


def _place(tensor: TensorLayout, parameter: torch.nn.Parameter) -> LocalShard:
    if tensor.expert is None:
        rank, ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
        replica = mpu.get_data_parallel_rank(with_context_parallel=True)
    else:
        rank, ranks = mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
        replica = mpu.get_expert_data_parallel_rank()
    return LocalShard(tensor, parameter, rank, ranks, replica)


class _Numbering:
    """Layer and expert numbers of one chunk, from local to global; the modules themselves know theirs."""

    def __init__(self, chunk: Any) -> None:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        layers = chunk.decoder.layers
        self.layers = {i: layer.layer_number - 1 for i, layer in enumerate(layers)}
        self.experts = {
            (i, local): expert
            for i, layer in enumerate(layers)
            for local, expert in enumerate(getattr(layer.mlp, "local_expert_indices", ()))
        }

    def globally(self, name: str) -> str:
        match = re.match(r"decoder\.layers\.(\d+)\.", name)
        if match is None:
            return name
        layer = int(match[1])
        name = f"decoder.layers.{self.layers[layer]}." + name[match.end() :]
        return re.sub(
            r"\.local_experts\.(\d+)\.", lambda m: f".local_experts.{self.experts[layer, int(m[1])]}.", name
        )
