"""Draw token ids from logits with randomness that belongs to the row, not to the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class RowUniforms:
    """One stream of uniforms in [0, 1) per row: the counter-based generator Philox keyed by the row's seed.

    Draw t of a row is a function of (seed, t) alone, so a row sampled in any batch sees the same numbers.
    """

    def __init__(self, seeds: Sequence[int], *, block: int = 128) -> None:
        self._generators = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
        self._block = block
        self._numbers = np.empty((len(seeds), 0))
        self._next = 0

    def draw(self) -> np.ndarray:
        """float64 [rows]: the next number of every row."""
        if self._next == self._numbers.shape[1]:
            self._numbers = np.stack([generator.random(self._block) for generator in self._generators])
            self._next = 0
        self._next += 1
        return self._numbers[:, self._next - 1]

    def keep(self, rows: np.ndarray) -> None:
        """Forget every row but `rows` (int [R])."""
        self._generators = [self._generators[row] for row in rows]
        self._numbers = self._numbers[rows]


def sample(
    logits: Tensor, uniforms: Tensor | None, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Ids and their log-probs.

    logits: [B, V] any float type. uniforms: float64 [B], or None for the most likely id.
    Returns ids int64 [B] and log-probs float32 [B] of the softmax at `temperature` (at 1 when greedy), over
    the whole vocabulary: top-p decides what may be drawn and leaves the reported log-prob alone.
    """
    scores = logits.float()
    if uniforms is None:
        logprobs = torch.log_softmax(scores, dim=-1)
        ids = logprobs.argmax(dim=-1, keepdim=True)
        return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1)
    logprobs = torch.log_softmax(scores / temperature, dim=-1)
    mass = logprobs.double().exp_()
    order = None
    if top_p < 1.0:
        mass, order = mass.sort(dim=-1, descending=True, stable=True)
        before = mass.cumsum(dim=-1) - mass
        mass = mass.masked_fill(before >= top_p, 0.0)
        mass[:, 0].clamp_(min=torch.finfo(torch.float64).tiny)
    cumulative = mass.cumsum_(dim=-1)
    total = cumulative[:, -1:].contiguous()
    ids = torch.searchsorted(cumulative, uniforms.unsqueeze(1) * total, right=True)
    # u * total may round up to total: the last id that has mass, never one beyond it.
    ids = torch.minimum(ids, torch.searchsorted(cumulative, total))
    ids = ids.clamp_(max=logits.shape[-1] - 1)  # NaN sorts nowhere; the caller sees it in the log-prob
    if order is not None:
        ids = order.gather(1, ids)
    return ids.squeeze(1), logprobs.gather(1, ids).squeeze(1)
