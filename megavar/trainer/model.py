"""A model on this rank: built, loaded from Hugging Face weights, and able to give the log-probs of its targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megavar_kernels import linear_logprob
from torch import Tensor

from megavar.models.architecture import Architecture, read_architecture
from megavar.models.build import build_model, transformer_config
from megavar.models.hf_import import load_hf_weights
from megavar.parallel.groups import Groups
from megavar.trainer.batch import MicroBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How every model of a run is placed and fed."""

    dtype: str = "bfloat16"
    sequence_parallel: bool = False
    packing: bool = True
    recompute: str = "none"


@dataclass(slots=True, kw_only=True)
class Model:
    """One model's part on this rank."""

    module: GPTModel
    config: TransformerConfig
    architecture: Architecture
    hf_directory: Path
    groups: Groups
    settings: Settings

    @property
    def length_multiple(self) -> int:
        """Token counts of micro-batches are padded to a multiple of this."""
        return self.groups.tp if self.settings.sequence_parallel else 1


def load_model(hf_directory: Path, groups: Groups, settings: Settings) -> Model:
    """Build the model that `config.json` describes and load its weights; every rank reads only its own slices.

    Raises:
        UserError: see `read_architecture`, `Architecture.check_layout`, `load_hf_weights`.
    """
    architecture = read_architecture(hf_directory)
    config = transformer_config(
        architecture,
        groups,
        dtype=DTYPES[settings.dtype],
        sequence_parallel=settings.sequence_parallel,
        recompute=settings.recompute,
    )
    module = build_model(architecture, config, groups)
    load_hf_weights([module], architecture, hf_directory)
    return Model(
        module=module,
        config=config,
        architecture=architecture,
        hf_directory=hf_directory,
        groups=groups,
        settings=settings,
    )


def forward(model: Model, module: torch.nn.Module, batch: MicroBatch, temperature: float) -> Tensor:
    """On the last pipeline stage log p(target) fp32 [T], 0 where ignored; on earlier stages hidden states.

    module: the model's module, or its data-parallel wrapper while training.
    """
    vocab_start = model.groups.tp_rank * (model.architecture.padded_vocab(model.groups.tp) // model.groups.tp)

    def logprobs(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any
    ) -> Tensor:
        return linear_logprob(
            hidden_states.flatten(0, 1),
            output_layer.weight if output_weight is None else output_weight,
            batch.targets,
            temperature=temperature,
            vocab_start=vocab_start,
            vocab_size=model.architecture.vocab_size,
            group=mpu.get_tensor_model_parallel_group() if model.groups.tp > 1 else None,
            sequence_parallel=model.settings.sequence_parallel,
        )[0]

    return module(
        batch.tokens, batch.positions, None, packed_seq_params=batch.rows, output_processor=logprobs
    )
