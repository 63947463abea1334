"""Weights of the baselines, and the per-question multiplier that turns them into one another."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megavar.objectives.segments import check_offsets, compute_dtype, segment_ids, segment_mean, segment_sum

QuestionWeight = Literal["none", "inverse_accuracy", "inverse_std", "self_normalised"]


def sft_weights(question_offsets: Tensor, *, eligible: Tensor | None = None) -> Tensor:
    """Supervised fine-tuning on data-set traces: mass one per question, shared evenly by its traces.

    Args:
        question_offsets: integer [Q+1] over traces; a question without a trace has none.
        eligible: bool [N], False for traces that are not to be trained on.

    Returns:
        float32 [N]; 1 for the only trace of a question.
    """
    total = int(question_offsets[-1])
    check_offsets(question_offsets, total, "question_offsets")
    taken = torch.ones(total, device=question_offsets.device)
    if eligible is not None:
        taken = taken * eligible
    return question_multiplied(taken, question_offsets, "self_normalised")


def rft_weights(
    scores: Tensor,
    question_offsets: Tensor,
    *,
    question_weight: QuestionWeight = "none",
    accuracy: Tensor | None = None,
) -> Tensor:
    """Rejection-sampling fine-tuning: 1/K on each correct one of K samples (z, y) ~ pi_ref.

    It climbs L = E_ref[1(y in Y) log pi(z, y|x)], with grad L = -P_ref(Y|x) grad KL(P_ref(z|x,Y) || pi(z|x))
    (Eq. 10): the forward KL of the variational objective, multiplied by the accuracy. A question's mass is
    its accuracy, so easy questions dominate; `question_weight` takes that factor out (`question_multiplied`).

    Args:
        scores: [N] verifier scores in [0, 1] of all samples, wrong and open ones included (score 0).
        question_offsets: integer [Q+1] over samples; K may differ between questions.
        question_weight: multiplier of each question.
        accuracy: float [Q], P^; None takes the mean score of the question's samples.

    Returns:
        float32 (float64 for float64 scores) [N].
    """
    check_offsets(question_offsets, scores.numel(), "question_offsets")
    if scores.numel() and not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError("verifier scores must lie in [0, 1]")
    samples = question_offsets.diff()[segment_ids(question_offsets)]
    weights = scores.to(compute_dtype(scores)) / samples
    if accuracy is None:
        # Not the sum of the weights: with K of K correct this is exactly one.
        accuracy = segment_mean(scores, question_offsets).to(weights.dtype)
    return question_multiplied(weights, question_offsets, question_weight, accuracy=accuracy)


def question_multiplied(
    weights: Tensor, question_offsets: Tensor, kind: QuestionWeight, *, accuracy: Tensor | None = None
) -> Tensor:
    """Multiply each question's weights by g(P^), with P^ its accuracy.

    RFT and binary-reward RL move along -P grad KL(P(z|x,Y) || pi) (Eq. 10, 11), GRPO along
    -sqrt(P/(1-P)) grad KL (Eq. 12), the variational objective along -grad KL. From the first:
    "none" keeps P; "inverse_std" multiplies by 1/sqrt(P (1-P)) and gives GRPO's factor; "inverse_accuracy" by
    1/P and gives the variational one; "self_normalised" divides by the weights' own sum, the same without P^.
    Where the divisor is zero (no success; for "inverse_std" also no failure, where GRPO's advantages vanish)
    the question's weights become zero.

    Args:
        weights: float [N], non-negative for "self_normalised".
        question_offsets: integer [Q+1].
        kind: multiplier.
        accuracy: float [Q] in [0, 1]; needed by "inverse_accuracy" and "inverse_std".
    """
    if kind not in get_args(QuestionWeight):
        raise ValueError(f"question_weight={kind!r} is not one of {get_args(QuestionWeight)}")
    check_offsets(question_offsets, weights.numel(), "question_offsets")
    if kind == "none":
        return weights
    if kind == "self_normalised":
        if bool((weights < 0).any()):
            raise ValueError("self-normalised weights need non-negative weights")
        divisor = segment_sum(weights, question_offsets)
    else:
        if accuracy is None or accuracy.numel() != question_offsets.numel() - 1:
            raise ValueError(f"question_weight={kind!r} needs one accuracy per question")
        divisor = accuracy if kind == "inverse_accuracy" else (accuracy * (1 - accuracy)).sqrt()
    factor = torch.where(divisor > 0, 1 / divisor, 0).to(weights.dtype)
    return weights * factor[segment_ids(question_offsets)]
