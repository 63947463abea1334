"""Parameters alone, as Megatron-Core's sharded checkpoints hold them, whichever layers the ranks are built of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.models.gpt import GPTModel


def sharded_parameters(chunk: GPTModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """Megatron's description of a chunk's parameters, for saving and for loading, without the modules' extra state.

    Which modules have extra state depends on their make, transformer-engine's or Megatron's own, and it is empty but
    for the history of FP8's delayed scaling. So a checkpoint of one is a checkpoint of the other.
    """
    described = chunk.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in described.items() if not isinstance(part, ShardedObject)}


def load_parameters(chunk: GPTModel, state: Mapping[str, Any]) -> None:
    """state: what was loaded for `sharded_parameters`."""
    found = chunk.load_state_dict(state, strict=False)
    lacking = [name for name in found.missing_keys if "_extra_state" not in name]
    assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)
