"""What the policy-gradient objectives share: baselines, and separate weights for thought and answer.

An expectation E_pi[R grad log pi] over K samples is the weights R_k / K. A baseline that does not depend on sample k
changes no expectation: E[grad log pi] = 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megavar.objectives.question_weight import QuestionWeight, question_multiplied
from megavar.objectives.segments import (
    check_offsets,
    compute_dtype,
    pad,
    segment_ids,
    segment_mean,
    segment_std,
)

Baseline = Literal["none", "mean", "leave_one_out"]


class SegmentWeights(NamedTuple):
    """Weights of N traces, signed: coefficients of grad log pi(z|x) and of grad log pi(y|x,z)."""

    thought: Tensor
    """float [N]"""
    answer: Tensor
    """float [N]"""


def samples_of(question_offsets: Tensor) -> Tensor:
    """int64 [N]: K of each trace's own question."""
    return question_offsets.diff()[segment_ids(question_offsets)]


def subtract_baseline(rewards: Tensor, question_offsets: Tensor, baseline: Baseline) -> Tensor:
    """[N] rewards less the baseline of their question.

    "mean" includes the sample itself, so its expectation is (K-1)/K of the gradient; "leave_one_out" (Kool et al.
    2019; RLOO, arXiv 2402.14740) takes the mean of the others and is unbiased. A question with one sample has no
    others: its baseline is zero under "leave_one_out".
    """
    if baseline not in get_args(Baseline):
        raise ValueError(f"baseline={baseline!r} is not one of {get_args(Baseline)}")
    check_offsets(question_offsets, rewards.numel(), "question_offsets")
    rewards = rewards.to(compute_dtype(rewards))
    if baseline == "none":
        return rewards
    centred = rewards - segment_mean(rewards, question_offsets)[segment_ids(question_offsets)]
    if baseline == "mean":
        return centred
    count = samples_of(question_offsets).to(rewards.dtype)
    return torch.where(count > 1, centred * count / (count - 1), rewards)


def scaled_by_question(
    weights: Tensor, rewards: Tensor, question_offsets: Tensor, kind: QuestionWeight
) -> Tensor:
    """`question_multiplied` with the mean and the standard deviation of the question's own rewards.

    A spread below 1e-6 of the question's largest reward is rounding: it counts as one of equal rewards.
    """
    rewards = rewards.to(weights.dtype)
    std = segment_std(rewards, question_offsets)
    largest = pad(rewards.abs(), question_offsets, 0.0).amax(dim=1)
    return question_multiplied(
        weights,
        question_offsets,
        kind,
        accuracy=segment_mean(rewards, question_offsets),
        std=torch.where(std > 1e-6 * largest, std, 0.0),
    )
