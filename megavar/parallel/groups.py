"""Process groups of one run: who this rank is in tensor, pipeline and data parallelism, and on which device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

_PATIENCE = timedelta(hours=24)
"""How long a rank waits for another: the first one may sample for hours while the others stand at a barrier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """This rank's place. Group sizes multiply to the world size."""

    rank: int
    world: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    dp: int
    dp_rank: int
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes manifests and prints."""
        return self.rank == 0


def initialize(*, tp: int = 1, pp: int = 1, seed: int = 1234) -> Groups:
    """Join the job's processes (torchrun's or srun's environment; alone without one) and split them into groups.

    NCCL where CUDA is there, gloo elsewhere. May be called again with another layout: the groups are rebuilt.

    Raises:
        ValueError: the world size is not a multiple of tp * pp.
    """
    cuda = torch.cuda.is_available()
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
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE
        )
    world = dist.get_world_size()
    if world % (tp * pp):
        raise ValueError(f"{world} ranks cannot be split into tp={tp} x pp={pp}")
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Groups(
        rank=dist.get_rank(),
        world=world,
        tp=tp,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp=pp,
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
    )
