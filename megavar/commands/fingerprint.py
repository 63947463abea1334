"""A model's logits, from a Megatron checkpoint by our own model and from a Hugging Face directory by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megavar.errors import UserError
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.families import layout_table

_ROWS, _TOKENS = 2, 48
_TOLERANCE = 1e-4
"""Of the largest logit: float32 sums in another order stay far below, one wrong row far above."""


class Fingerprint(NamedTuple):
    largest_difference: float
    """Of any logit."""
    largest_logit: float
    same_argmax: float
    """Fraction of positions whose likeliest token is the same."""


def bytes_needed(hf: Path) -> int:
    """Host memory for one model in float32 while it is loaded; the two are loaded one after the other."""
    shapes = layout_table(read_architecture(hf)).checkpoint.values()
    return int(sum(torch.Size(shape).numel() for shape in shapes) * 4 * 1.25) + (1 << 29)


def compare_logits(hf: Path, weights: Path) -> Fingerprint:
    """Both in float32, on the same two rows of tokens; one model is in memory at a time.

    hf: a Hugging Face directory. weights: data of a Megatron checkpoint, of any layout.

    Raises UserError where a logit differs by more than rounding does.
    """
    architecture = read_architecture(hf)
    length = min(_TOKENS, architecture.max_positions)
    seeded = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, architecture.vocab_size, (_ROWS, length), generator=seeded)
    want = _of_transformers(hf, tokens)
    got = _of_megatron(architecture, weights, tokens)
    found = Fingerprint(
        largest_difference=(got - want).abs().max().item(),
        largest_logit=want.abs().max().item(),
        same_argmax=(got.argmax(-1) == want.argmax(-1)).float().mean().item(),
    )
    # A NaN is no agreement either.
    if not found.largest_difference <= _TOLERANCE * found.largest_logit:
        raise UserError(
            f"{hf} and {weights}: logits differ by {found.largest_difference:.3g} (the largest is "
            f"{found.largest_logit:.3g}), {found.same_argmax:.1%} of likeliest tokens are the same; "
            "is the config.json that of these weights?"
        )
    return found


@torch.inference_mode()
def _of_transformers(hf: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    return model.eval()(tokens).logits


@torch.inference_mode()
def _of_megatron(architecture: Architecture, weights: Path, tokens: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    from megavar.models.parallel_layout import ParallelLayout
    from megavar.parallel.groups import initialize

    groups = initialize(ParallelLayout())
    # After megavar.parallel, which adapts Megatron to a machine without CUDA.
    from megatron.core import dist_checkpointing

    from megavar.commands.checkpoint import sharded
    from megavar.models.build import build_model, transformer_config
    from megavar.models.sharded import load_parameters

    config = transformer_config(architecture, groups, dtype=torch.float32)
    chunks = build_model(architecture, config, groups)
    state = dist_checkpointing.load({"model": sharded(chunks)}, str(weights))
    load_parameters(chunks[0], state["model"][0])
    positions = torch.arange(tokens.shape[1], device=groups.device).expand(len(tokens), -1)
    logits = chunks[0].eval()(tokens.to(groups.device), positions, None)
    dist.destroy_process_group()
    return logits[..., : architecture.vocab_size].cpu()
