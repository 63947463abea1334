"""Micro-batches: examples laid end to end (packed) or alone, ready for the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavar.data.packing import padded_tokens
from megavar.data.training_set import Example
from megavar.models.modules import PackedRows
from megavar.models.replay import UNRECORDED

IGNORE = -100
"""Target of a token whose prediction is neither trained nor scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """T tokens: the examples' inputs with padding; of these the t = T / cp that this context-parallel rank holds."""

    tokens: Tensor
    """int64 [1, t]; an example of n tokens contributes its first n - 1."""
    positions: Tensor
    """int64 [1, t]; from 0 within each example."""
    targets: Tensor
    """int64 [t]; the next token of the response, `IGNORE` elsewhere."""
    weights: Tensor
    """float32 [t]; the example's weight, times its token weights, where there is a target, 0 elsewhere."""
    experts: Tensor | None
    """int16 [t, layers, k], where tokens were routed when they were sampled, `UNRECORDED` where nobody knows; None
    when no example says so."""
    rows: PackedRows | None
    """Sequence boundaries; None when the micro-batch is one example and no packing is asked for."""
    responses: tuple[slice, ...]
    """Where each example's response predictions lie among the T."""

    @property
    def replayed(self) -> Tensor:
        """int64 []: of this rank's predictions, those whose token goes to recorded experts."""
        if self.experts is None:
            return torch.zeros((), dtype=torch.int64, device=self.targets.device)
        return ((self.targets != IGNORE) & (self.experts[:, 0, 0] != UNRECORDED)).sum()


def padded_length(example: Example, cp: int) -> int:
    """Tokens that an example takes in a micro-batch."""
    return padded_tokens(len(example.ids), cp)


def build_micro_batch(
    examples: Sequence[Example],
    device: torch.device,
    *,
    multiple_of: int = 1,
    packing: bool = True,
    cp: int = 1,
    cp_rank: int = 0,
) -> MicroBatch:
    """Lay out the examples. None at all gives ignored tokens, since every rank must take part in a step.

    multiple_of: of the number of tokens of each rank, as sequence parallelism needs. Context parallelism pads each
    example to a multiple of 2 * cp.
    """
    # The padding behind an example is a causal tail that no target looks at.
    lengths = [padded_length(e, cp) for e in examples]
    whole = math.lcm(multiple_of, 2) * cp if cp > 1 else multiple_of
    padding = -sum(lengths) % whole if lengths else whole
    total = sum(lengths) + padding
    tokens, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    targets, weights = np.full(total, IGNORE, np.int64), np.zeros(total, np.float32)
    recorded = [None if e.experts is None else np.asarray(e.experts) for e in examples]
    kind = next((found.shape[1:] for found in recorded if found is not None), None)
    experts = None if kind is None else np.full((total, *kind), UNRECORDED, np.int16)
    responses, start = [], 0
    for example, length, routes in zip(examples, lengths, recorded, strict=True):
        end = start + len(example.ids) - 1
        response = slice(start + example.response_start - 1, end)
        tokens[start:end] = example.ids[:-1]
        positions[start : start + length] = np.arange(length)
        targets[response] = example.ids[example.response_start :]
        weights[response] = example.weight
        if example.token_weights is not None:
            weights[response] *= example.token_weights
        if experts is not None and routes is not None:
            experts[start : start + len(routes)] = routes
        responses.append(response)
        start += length
    positions[start:] = np.arange(padding)
    if not packing and len(examples) > 1:
        raise ValueError("without packing a micro-batch holds one example")
    rows = None
    # Unpacked, the padding is a causal tail of the one sequence. Split sequences are always described.
    if packing or cp > 1:
        sequences = [*lengths, *([padding] if padding else [])]
        rows = PackedRows.from_lengths(sequences, device, cp=cp, cp_rank=cp_rank)
    mine = slice(None) if rows is None or rows.split is None else rows.split.mine

    def part(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[mine]).to(device)

    return MicroBatch(
        tokens=part(tokens)[None],
        positions=part(positions)[None],
        targets=part(targets),
        weights=part(weights),
        experts=None if experts is None else part(experts),
        rows=rows,
        responses=tuple(responses),
    )
