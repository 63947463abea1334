"""A model on this rank: built, loaded from Hugging Face weights, and able to give the log-probs of its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megavar_kernels import linear_logprob
from torch import Tensor

from megavar.data.training_set import Example
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.build import build_model, transformer_config
from megavar.models.hf_import import load_hf_weights
from megavar.models.replay import replay
from megavar.models.switches import token_multiple
from megavar.parallel.groups import Groups
from megavar.trainer.batch import MicroBatch, build_micro_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How every model of a run is placed and fed."""

    dtype: str = "bfloat16"
    sequence_parallel: bool = False
    packing: bool = True
    recompute: str = "none"
    expert_balance: float = 0.0
    """Coefficient of the loss that balances experts; see `transformer_config`."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """Megatron-Core's own; see `megavar.models.switches`."""


@dataclass(slots=True, kw_only=True)
class Model:
    """One model's part on this rank."""

    chunks: list[GPTModel]
    """Its layers here, one chunk per virtual pipeline stage."""
    config: TransformerConfig
    architecture: Architecture
    hf_directory: Path
    groups: Groups
    settings: Settings

    @property
    def lockstep(self) -> bool:
        """Ranks with different examples hold each other's experts, so that all must pass through the model together."""
        return self.architecture.is_moe and self.groups.layout.ep * self.groups.layout.etp > 1

    @property
    def micro_batch_multiple(self) -> int:
        """The interleaved schedule works off its micro-batches in groups of as many as there are stages."""
        return self.groups.pp if len(self.chunks) > 1 else 1

    @property
    def token_multiple(self) -> int:
        """Of a rank's tokens in a micro-batch: what sequence parallelism splits, what FP8's matrix products take."""
        return token_multiple(self.settings.switches) * (
            self.groups.tp if self.settings.sequence_parallel else 1
        )

    def micro_batch(self, examples: Sequence[Example]) -> MicroBatch:
        """This rank's part of a micro-batch of these examples."""
        return build_micro_batch(
            examples,
            self.groups.device,
            multiple_of=self.token_multiple,
            packing=self.settings.packing,
            cp=self.groups.cp,
            cp_rank=self.groups.cp_rank,
        )


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
        balance_coefficient=settings.expert_balance,
        switches=settings.switches,
    )
    chunks = build_model(architecture, config, groups)
    load_hf_weights(chunks, architecture, hf_directory)
    return Model(
        chunks=chunks,
        config=config,
        architecture=architecture,
        hf_directory=hf_directory,
        groups=groups,
        settings=settings,
    )


def forward(model: Model, chunk: torch.nn.Module, batch: MicroBatch, temperature: float) -> Tensor:
    """From the last chunk log p(target) fp32 [T], 0 where ignored; from the others hidden states.

    chunk: one of the model's, or its data-parallel wrapper while training.
    """
    groups, settings = model.groups, model.settings
    if model.architecture.is_moe:
        split = settings.sequence_parallel
        replay(chunk, batch.experts, tp_rank=groups.tp_rank if split else 0, tp=groups.tp if split else 1)
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
            entropy=False,
        )[0]

    return chunk(batch.tokens, batch.positions, None, packed_seq_params=batch.rows, output_processor=logprobs)
