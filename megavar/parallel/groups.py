"""Process groups of one run: where this rank stands in every kind of parallelism, and on which device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megavar.errors import UserError
from megavar.models.parallel_layout import ParallelLayout, Place

_PATIENCE = timedelta(hours=24)
"""How long a rank waits for another: the first one may sample for hours while the others stand at a barrier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """This rank's place in the layout, and its device. `*_rank` is its number within that kind of parallelism."""

    layout: ParallelLayout
    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    """Ranks with the same number, in all stages and context and tensor parts, read the same examples."""
    pp_rank: int
    ep_rank: int
    etp_rank: int
    device: torch.device

    @property
    def world(self) -> int:
        return self.layout.ranks

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def cp(self) -> int:
        return self.layout.cp

    @property
    def dp(self) -> int:
        return self.layout.dp

    @property
    def pp(self) -> int:
        return self.layout.pp

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes manifests and prints."""
        return self.rank == 0

    @property
    def answers(self) -> bool:
        """True on the one rank of each data-parallel part that speaks for it: of the last stage, the first."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0


def megatron_sizes(layout: ParallelLayout) -> dict[str, Any]:
    """A layout under Megatron-Core's names, for its groups and for its models."""
    return dict(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )


def initialize(layout: ParallelLayout, *, seed: int = 1234) -> Groups:
    """Join the job's processes (torchrun's or srun's environment; alone without one) and split them into groups.

    NCCL where CUDA is there, gloo elsewhere. May be called again with another layout: the groups are rebuilt.

    Raises:
        UserError: the layout is for another number of ranks than were started.
    """
    cuda = torch.cuda.is_available()
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if world != layout.ranks:
        raise UserError(f"the layout is for {layout.ranks} ranks, but {world} were started")
    if not dist.is_initialized():
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }.items():
            os.environ.setdefault(name, value)
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    if mpu.model_parallel_is_initialized():
        _destroy_groups()
    mpu.initialize_model_parallel(**megatron_sizes(layout))
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    rank = dist.get_rank()
    place = Place(
        tp=mpu.get_tensor_model_parallel_rank(),
        cp=mpu.get_context_parallel_rank(),
        dp=mpu.get_data_parallel_rank(),
        pp=mpu.get_pipeline_model_parallel_rank(),
        ep=mpu.get_expert_model_parallel_rank(),
        etp=mpu.get_expert_tensor_parallel_rank(),
        edp=mpu.get_expert_data_parallel_rank(),
    )
    if place != layout.place(rank):
        raise RuntimeError(f"Megatron places rank {rank} at {place}, ParallelLayout at {layout.place(rank)}")
    return Groups(
        layout=layout,
        rank=rank,
        tp_rank=place.tp,
        cp_rank=place.cp,
        dp_rank=place.dp,
        pp_rank=place.pp,
        ep_rank=place.ep,
        etp_rank=place.etp,
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )


def _destroy_groups() -> None:
    """Megatron forgets its groups but keeps their connections: buffers with NCCL, a polling thread each with gloo."""
    dist.barrier()  # a peer may still be at its last operation
    groups = [group for group in mpu._global_process_group_list[1:] if group is not None]
    mpu.destroy_model_parallel()
    for group in groups:
        if group in dist.distributed_c10d._world.pg_map:  # some were Megatron's to destroy
            dist.destroy_process_group(group)
