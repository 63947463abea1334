"""Fused operators for training language models by weighted log-likelihood.

linear_logprob: per-token log-probability and entropy from hidden states and the (sharded) output weight.
trace_weights: self-normalised weights, bounds and effective sample size of K traces per question.
"""

from .linear_logprob import linear_logprob, linear_logprob_forward, linear_logprob_forward_backward
from .trace_weights import TraceWeights, posterior_score_weights, trace_weights

__all__ = [
    "TraceWeights",
    "linear_logprob",
    "linear_logprob_forward",
    "linear_logprob_forward_backward",
    "posterior_score_weights",
    "trace_weights",
]
