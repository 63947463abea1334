"""Weights of K thinking traces per question, the multi-trace bounds and the effective sample size.

For trace k of a question, with n_k thought tokens and answer probability c_k (paper arXiv 2509.22637):

    s_k     = (1 / n_k) sum_t (log pi(z_t) - log q(z_t))        length-normalised log-ratio, eq. 8
    log rho = clamp(temper * s_k, -clip, clip) + log c_k
    w_k     = rho_k / sum_j rho_j                               self-normalised weight, eq. 6
    L_k     = log (1 / k) sum_(j <= k) rho_j                    bound over the first k traces, eq. 5
    ESS     = (sum_k rho_k)^2 / sum_k rho_k^2

everything in log space. CPU tensors are computed here, CUDA tensors by trace_weights_triton in one launch.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import trace_weights_reference
from .arguments import INDEX_DTYPES, debug_checks, require_same_device, require_vector

MAX_TRACES = 256


class TraceWeights(NamedTuple):
    """Results of `trace_weights` for S traces of Q questions, in the dtype of the log-probs.

    A question without traces has effective sample size 0. A question all of whose rho are zero (every log rho
    -inf) has weights 0, bounds -inf, effective sample size 0 and no gradient: skipping it or falling back to
    other data is the caller's decision.
    """

    log_ratio: Tensor
    """`[S]` s_k, before temper and clip; 0 for a trace without tokens."""
    log_rho: Tensor
    """`[S]`"""
    weights: Tensor
    """`[S]`, sum 1 within a question. Constants for autograd, as in equation 6."""
    bounds: Tensor
    """`[S]`: at trace k the bound over its question's traces up to and including k."""
    effective_sample_size: Tensor
    """`[Q]`, between 1 and K. Constant for autograd."""


class Ratio(NamedTuple):
    """How a trace's log-ratio enters log rho."""

    temper: float
    clip: float  # inf for none
    length_normalize: bool


def trace_weights(
    policy_logprob: Tensor,
    posterior_logprob: Tensor,
    cu_seqlens: Tensor,
    question_offsets: Tensor,
    *,
    log_likelihood: Tensor | None = None,
    accuracy: Tensor | None = None,
    temper: float = 1.0,
    clip: float | None = None,
    length_normalize: bool = True,
) -> TraceWeights:
    """Weights, bounds and effective sample size of ragged groups of traces; see the module for the formulas.

    log_ratio, log_rho and bounds are differentiable in policy_logprob, posterior_logprob and log_likelihood.
    The gradient of a question's last bound is equation 6: rho~_k times the gradient of log rho_k.

    Args:
        policy_logprob: `[N]` fp32 (fp64 on the CPU), log pi of every thought token, traces one after another.
        posterior_logprob: `[N]` same dtype, log q of the same tokens; finite.
        cu_seqlens: `[S + 1]` int32 or int64, first token of each trace and, at the end, N.
        question_offsets: `[Q + 1]` dtype of cu_seqlens, first trace of each question and, at the end, S; at
            most 256 traces a question.
        log_likelihood: `[S]` log c_k, from likelihoods of the reference answer. Exactly one of this and
        accuracy: `[S]` c_k in [0, 1], from sampled answers; 0 gives log rho = -inf.
        temper: exponent of the ratio, >= 0; 0 leaves it out.
        clip: bound > 0 on |temper * s_k|; None for none.
        length_normalize: False sums over tokens instead of taking their mean: the unbiased ratio, for which
            L_k is a lower bound of the log evidence (eq. 5).

    Raises:
        TypeError: dtype of a tensor.
        ValueError: shape, contiguity or device of a tensor, a negative temper or clip, both or neither answer
            argument; on the CPU, and on a device under MEGAVAR_KERNELS_DEBUG=1, also offsets that do not
            ascend from 0 to the end, a question of more than 256 traces (NaN otherwise), an accuracy outside
            [0, 1].
        RuntimeError: CUDA tensors without triton installed.
    """
    if (log_likelihood is None) == (accuracy is None):
        raise ValueError("log_likelihood, accuracy: exactly one of the two is needed")
    ratio = Ratio(float(temper), math.inf if clip is None else float(clip), length_normalize)
    if not (math.isfinite(ratio.temper) and ratio.temper >= 0):
        raise ValueError(f"temper: must be finite and not negative, got {temper}")
    if not ratio.clip > 0:
        raise ValueError(f"clip: must be positive, got {clip}")
    _check_tensors(policy_logprob, posterior_logprob, cu_seqlens, question_offsets, log_likelihood, accuracy)
    return TraceWeights(
        *_TraceWeights.apply(
            policy_logprob, posterior_logprob, log_likelihood, accuracy, cu_seqlens, question_offsets, ratio
        )
    )


def posterior_score_weights(result: TraceWeights, question_offsets: Tensor) -> Tensor:
    """`[S]` coefficients of grad log q(z_k) in the score-function gradient of L_K in the posterior.

    L_K - rho~_k (equation A.2), without a baseline; 0 in a question all of whose rho are zero.
    """
    bounds = result.bounds.detach()
    counts = question_offsets.diff()
    last = (question_offsets[1:] - 1).clamp(min=0).long()
    final = bounds[last] if bounds.shape[0] else bounds.new_zeros(counts.shape)
    final = final.repeat_interleave(counts, output_size=bounds.shape[0])
    return torch.where(torch.isneginf(final), 0.0, final - result.weights)


class _TraceWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, policy, posterior, log_likelihood, accuracy, cu_seqlens, question_offsets, ratio):
        backend = _backend(policy)
        result = backend.forward(
            policy, posterior, log_likelihood, accuracy, cu_seqlens, question_offsets, ratio
        )
        log_ratio, log_rho, weights, bounds, effective_sample_size = result
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(weights, effective_sample_size)
        ctx.save_for_backward(log_ratio, log_rho, bounds, cu_seqlens, question_offsets)
        ctx.ratio, ctx.tokens = ratio, policy.shape[0]
        return log_ratio, log_rho, weights, bounds, effective_sample_size

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_ratio, grad_log_rho, _weights, grad_bounds, _effective_sample_size):
        log_ratio, log_rho, bounds, cu_seqlens, question_offsets = ctx.saved_tensors
        ratio = ctx.ratio
        grad_rho = torch.zeros_like(log_rho) if grad_log_rho is None else grad_log_rho
        if grad_bounds is not None:
            backend = _backend(log_rho)
            grad_bounds = grad_bounds.contiguous()
            grad_rho = grad_rho + backend.bounds_backward(grad_bounds, log_rho, bounds, question_offsets)
        unclipped = (ratio.temper * log_ratio).abs() <= ratio.clip
        grad_ratio = torch.where(unclipped, ratio.temper * grad_rho, 0.0)
        if grad_log_ratio is not None:
            grad_ratio = grad_ratio + grad_log_ratio
        lengths = cu_seqlens.diff()
        if ratio.length_normalize:
            grad_ratio = grad_ratio / lengths.clamp(min=1)
        per_token = grad_ratio.repeat_interleave(lengths, output_size=ctx.tokens)
        return per_token, -per_token, grad_rho if ctx.needs_input_grad[2] else None, None, None, None, None


def _backend(logprob: Tensor) -> ModuleType:
    """The module that computes `forward` and `bounds_backward` for tensors on this device."""
    if logprob.device.type == "cpu":
        return trace_weights_reference
    try:
        from . import trace_weights_triton
    except ImportError as error:
        raise RuntimeError(
            f"policy_logprob: is on {logprob.device}, which needs the triton package"
        ) from error
    return trace_weights_triton


def _check_tensors(
    policy: Tensor,
    posterior: Tensor,
    cu_seqlens: Tensor,
    question_offsets: Tensor,
    log_likelihood: Tensor | None,
    accuracy: Tensor | None,
) -> None:
    dtypes = (torch.float32, torch.float64) if policy.device.type == "cpu" else (torch.float32,)
    require_vector("policy_logprob", policy, None, dtypes)
    require_vector("posterior_logprob", posterior, policy.shape[0], (policy.dtype,))
    require_vector("cu_seqlens", cu_seqlens, None, INDEX_DTYPES)
    require_vector("question_offsets", question_offsets, None, (cu_seqlens.dtype,))
    for name, offsets in (("cu_seqlens", cu_seqlens), ("question_offsets", question_offsets)):
        if offsets.shape[0] == 0:
            raise ValueError(f"{name}: needs at least the one element 0")
    answer_name, answer = "accuracy", accuracy
    if accuracy is None:
        answer_name, answer = "log_likelihood", log_likelihood
    require_vector(answer_name, answer, cu_seqlens.shape[0] - 1, (policy.dtype,))
    for name, tensor in (
        ("posterior_logprob", posterior),
        ("cu_seqlens", cu_seqlens),
        ("question_offsets", question_offsets),
        (answer_name, answer),
    ):
        require_same_device(name, tensor, "policy_logprob", policy)

    if not debug_checks(policy):
        return
    for name, offsets, end in (
        ("cu_seqlens", cu_seqlens, policy.shape[0]),
        ("question_offsets", question_offsets, cu_seqlens.shape[0] - 1),
    ):
        if offsets[0] != 0 or offsets[-1] != end or (offsets.diff() < 0).any():
            raise ValueError(f"{name}: must ascend from 0 to {end}")
    most = int(question_offsets.diff().amax()) if question_offsets.shape[0] > 1 else 0
    if most > MAX_TRACES:
        raise ValueError(f"question_offsets: a question has {most} traces, the most is {MAX_TRACES}")
    if accuracy is not None and not ((accuracy >= 0) & (accuracy <= 1)).all():
        raise ValueError("accuracy: must be between 0 and 1")
