"""Independent fp64 oracles: the textbook formulas on full logits, differentiated by autograd."""

import os
import sys

import torch
from torch import Tensor


def logprob_and_entropy(hidden, weight, target, temperature=1.0, ignore_index=-100, vocab_size=None):
    """(logprob, entropy) `[T]` fp64 of softmax over all V columns, zero at ignored tokens."""
    z = hidden.double() @ weight.double()[:vocab_size].t() / temperature
    log_p = z.log_softmax(-1)
    live = target != ignore_index
    picked = log_p.gather(1, target.long().where(live, 0)[:, None])[:, 0]
    return picked * live, -(log_p.exp() * log_p).sum(1) * live


def gradients(hidden, weight, target, grad_logprob, grad_entropy=None, **options) -> tuple[Tensor, Tensor]:
    """fp64 gradients of sum(grad_logprob * logprob + grad_entropy * entropy)."""
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    logprob, entropy = logprob_and_entropy(hidden, weight, target, **options)
    loss = (logprob * grad_logprob.double()).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy.double()).sum()
    return torch.autograd.grad(loss, (hidden, weight))


def within_ulp(actual: Tensor, expected: Tensor, ulps: float = 1.0, floor: float = 0.0) -> bool:
    """Whether `actual` is within `ulps` units in the last place of `expected` rounded to actual's dtype.

    `floor`: absolute slack for elements that cancel to almost nothing.
    """
    eps = torch.finfo(actual.dtype).eps
    exponent = torch.floor(torch.log2(expected.abs().clamp(min=1e-30)))
    return bool(((actual.double() - expected).abs() <= ulps * eps * torch.exp2(exponent) + floor).all())


def child_environment(**variables: str) -> dict[str, str]:
    """Environment in which a child process imports what this one can."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **variables}
