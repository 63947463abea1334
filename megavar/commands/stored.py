"""Weights on disk in any of our forms, into a model under any layout: what commands on stored models share.

A Hugging Face directory (config.json), a checkpoint of `megavar import` (import.json), a fit's directory of
checkpoints (its newest complete one), or one of them (step-000100).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megavar.commands.checkpoint import COMPANIONS, MANIFEST, WEIGHTS, read_manifest, sharded
from megavar.errors import UserError, in_one_line

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from megavar.models.architecture import Architecture
    from megavar.parallel.groups import Groups


class Stored(NamedTuple):
    """Where the weights are, and the Hugging Face directory with config and tokenizer that belong to them."""

    weights: Path
    hf: Path
    is_hf: bool


def find_stored(source: Path, hf: Path | None) -> Stored:
    """hf: where a fit's checkpoint finds its config; other forms bring their own. Torch-free.

    Raises UserError for anything else, or when a file is missing.
    """
    if (source / "config.json").is_file():
        return Stored(source, source, True)
    if (source / MANIFEST).is_file():
        read_manifest(source)
        return Stored(source / WEIGHTS, source / COMPANIONS, False)
    found = source
    if (source / "latest").is_file():
        found = source / f"step-{int((source / 'latest').read_text()):06d}"
    if not (found / ".metadata").is_file():
        raise UserError(
            f"{source} is no Hugging Face directory (config.json), no checkpoint of `megavar import` ({MANIFEST}) "
            "and no checkpoint of a fit (latest, or .metadata in a step-* directory)"
        )
    if hf is None:
        raise UserError(f"{source} is a fit's checkpoint; name its model's config by --model HF_DIR")
    return Stored(found, hf, False)


def load_stored(stored: Stored, groups: Groups) -> tuple[list[GPTModel], Architecture]:
    """The model's chunks on this rank in the type they are stored in; collective.

    Raises UserError where the weights are not those of the config.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    from megavar.models.architecture import read_architecture
    from megavar.models.build import build_model, transformer_config
    from megavar.models.hf_import import load_hf_weights
    from megavar.models.sharded import load_parameters

    architecture = read_architecture(stored.hf)
    dtype = getattr(torch, architecture.dtype)
    if not stored.is_hf:
        tensors = dist_checkpointing.load_tensors_metadata(str(stored.weights))
        found = tensors.get("embedding.word_embeddings.weight")
        if found is None:
            raise UserError(
                f"{stored.weights}: no word embeddings among its tensors; is it a language model's?"
            )
        dtype = found.dtype
    chunks = build_model(architecture, transformer_config(architecture, groups, dtype=dtype), groups)
    if stored.is_hf:
        load_hf_weights(chunks, architecture, stored.hf)
        return chunks, architecture
    asked = {"model": sharded(chunks)}
    try:
        state = dist_checkpointing.load(asked, str(stored.weights))
    except CheckpointingException as error:
        told = f"not the weights of {stored.hf / 'config.json'}: {in_one_line(error)}"
        raise UserError(f"{stored.weights}: {told}") from None
    for index, chunk in enumerate(chunks):
        load_parameters(chunk, state["model"][index])
    return chunks, architecture
