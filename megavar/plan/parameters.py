"""How many parameters each rank holds, counted from the table of tensor layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from megavar.models.architecture import Architecture
from megavar.models.families import layout_table
from megavar.models.layout import TensorLayout
from megavar.models.parallel_layout import ParallelLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Elements on one rank."""

    dense: int
    """Their gradients and optimizer state are shared out over the dp * cp ranks that hold the same ones."""
    expert: int = 0
    """Likewise over the edp ranks."""
    linear: int = 0
    """Of both, those of the layers' linear projections."""

    @property
    def total(self) -> int:
        return self.dense + self.expert


def stage_parameters(architecture: Architecture, layout: ParallelLayout) -> tuple[Parameters, ...]:
    """What a rank of each pipeline stage holds; tied embeddings have a second copy on a last stage of its own."""
    count = _counts(architecture, layout.tp, layout.etp)
    layers = architecture.num_layers // layout.pp
    tied_to_embedding = architecture.tied and layout.pp == 1
    return tuple(
        Parameters(
            dense=layers * count.layer
            + (count.embedding if stage == 0 else 0)
            + (count.final_norm if stage == layout.pp - 1 else 0)
            + (count.output if stage == layout.pp - 1 and not tied_to_embedding else 0),
            expert=layers * count.experts // layout.ep,
            linear=layers * count.projections + layers * count.experts // layout.ep,
        )
        for stage in range(layout.pp)
    )


class _Counts(NamedTuple):
    embedding: int
    layer: int
    projections: int
    """Of the layer without its experts."""
    experts: int
    """All of a layer."""
    final_norm: int
    output: int


@lru_cache(maxsize=256)
def _counts(architecture: Architecture, tp: int, etp: int) -> _Counts:
    """Elements of one tensor-parallel rank. All layers are alike: one is enough of the table."""
    tensors = layout_table(replace(architecture, num_layers=1)).tensors

    def total(ranks: int, wanted: Callable[[TensorLayout], bool]) -> int:
        return sum(math.prod(t.shard_shape(ranks)) for t in tensors if wanted(t))

    return _Counts(
        embedding=total(tp, lambda t: t.stage == "embedding"),
        layer=total(tp, lambda t: t.stage == "layer" and t.expert is None),
        projections=total(
            tp,
            lambda t: t.stage == "layer" and t.expert is None and not t.copies and len(t.full_shape(1)) > 1,
        ),
        experts=total(etp, lambda t: t.expert is not None),
        final_norm=total(tp, lambda t: t.stage == "final" and t.copies),
        output=total(tp, lambda t: t.stage == "final" and not t.copies),
    )


def model_parameters(architecture: Architecture) -> tuple[int, int]:
    """(parameters of the whole model, those that a token passes through)."""
    (all_of_it,) = stage_parameters(architecture, ParallelLayout())
    if not architecture.is_moe:
        return all_of_it.total, all_of_it.total
    active = all_of_it.expert * architecture.experts_per_token // architecture.num_experts
    return all_of_it.total, all_of_it.dense + active
