"""Fused operators for training language models by weighted log-likelihood.

linear_logprob: per-token log-probability and entropy from hidden states and the (sharded) output weight.
"""

from .linear_logprob import linear_logprob, linear_logprob_forward, linear_logprob_forward_backward

__all__ = ["linear_logprob", "linear_logprob_forward", "linear_logprob_forward_backward"]
