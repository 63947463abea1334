"""From example weights to token weights: the "Dr. SFT" loss (Appendix C).

L = -(1/|B|) sum_{x in B} sum_k w_{x,k} (1/C) sum_t log pi(token_t), where C, the mean response length over
the training set, is one constant. Dividing by a batch's own token count instead would weigh a sequence by the
company it is in; with a constant, each example counts by its weight alone, under any packing and any layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megavar.objectives.segments import compute_dtype


def mean_response_length(lengths: Tensor) -> float:
    """C: the mean number of response tokens (thought and answer, markers included) per training example.

    Args:
        lengths: integer [E], one entry for every example that is trained on.

    Raises:
        ValueError: no examples, or an example without response tokens.
    """
    if lengths.numel() == 0:
        raise ValueError("the training set is empty: there is no mean response length")
    if bool((lengths < 1).any()):
        raise ValueError(f"training example {int((lengths < 1).nonzero()[0])} has no response tokens")
    return int(lengths.sum()) / lengths.numel()


def token_weights(weights: Tensor, lengths: Tensor, *, normaliser: float, questions: int) -> Tensor:
    """w_e / (C |B|) on each response token of example e; the loss is -sum_t weight_t log p(token_t).

    Args:
        weights: [E] example weights.
        lengths: integer [E] response tokens of each example.
        normaliser: C, from `mean_response_length` over the training set.
        questions: |B|, the number of questions in the global batch (not of this rank, not of examples).

    Returns:
        [sum of lengths] float32 (float64 for float64 weights), example after example.
    """
    if weights.shape != lengths.shape or weights.ndim != 1:
        raise ValueError(
            f"weights {list(weights.shape)} and lengths {list(lengths.shape)} must be vectors [E]"
        )
    if not normaliser > 0 or questions < 1:
        raise ValueError(f"normaliser={normaliser} and questions={questions} must be positive")
    scaled = weights.to(compute_dtype(weights)) / (normaliser * questions)
    return torch.repeat_interleave(scaled, lengths)
