"""What `megavar import` writes and `megavar export` reads: a model as a Megatron distributed checkpoint.

    <checkpoint>/import.json   layout and type of the weights
    <checkpoint>/weights/      torch_dist shards
    <checkpoint>/hf/           config, generation settings, tokenizer and chat template, byte for byte

Weights only: optimizer state belongs to `megavar.trainer.checkpoint`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megavar.errors import UserError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

MANIFEST = "import.json"
WEIGHTS = "weights"
COMPANIONS = "hf"


class Manifest(NamedTuple):
    tp: int
    pp: int
    dtype: str
    """Of the parameters: "float32" or "bfloat16"."""

    def write(self, checkpoint: Path) -> None:
        (checkpoint / MANIFEST).write_text(json.dumps(self._asdict()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Raises UserError where the file is damaged."""
        path = checkpoint / MANIFEST
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); import the model again") from None


def save_weights(module: GPTModel, directory: Path) -> None:
    """Write the parameters of all ranks into an empty directory; collective."""
    from megatron.core import dist_checkpointing

    dist_checkpointing.save({"model": module.sharded_state_dict(metadata=_metadata())}, str(directory))


def load_weights(module: GPTModel, directory: Path) -> None:
    """Fill this rank's parameters; collective. Raises UserError where files are missing or damaged."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        state = dist_checkpointing.load(
            {"model": module.sharded_state_dict(metadata=_metadata())}, str(directory)
        )
    except (CheckpointingException, OSError) as error:
        raise UserError(f"{directory} cannot be loaded ({error}); import the model again") from None
    module.load_state_dict(state["model"])


def copy_companions(source: Path, target: Path) -> None:
    """Copy the config and what travels with the weights byte for byte into `target`, made where missing."""
    from megavar.models import hf_export

    target.mkdir(exist_ok=True)
    for pattern in ("config.json", *hf_export.COMPANIONS):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


def _metadata() -> dict[str, object]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"dp_cp_group": group, "singleton_local_shards": False}
