"""Reference of trace_weights in plain torch: fp32 or fp64, any device, vectorised over questions."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    policy: Tensor,
    posterior: Tensor,
    log_likelihood: Tensor | None,
    accuracy: Tensor | None,
    cu_seqlens: Tensor,
    question_offsets: Tensor,
    ratio,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of trace_weights.TraceWeights; ratio is a trace_weights.Ratio."""
    lengths = cu_seqlens.diff()
    traces = torch.arange(lengths.shape[0], device=policy.device).repeat_interleave(lengths)
    # fp64: a sequential fp32 sum over 30,000 tokens would lose three digits
    total = torch.zeros(lengths.shape, dtype=torch.float64, device=policy.device)
    total.index_add_(0, traces, policy.double() - posterior.double())
    if ratio.length_normalize:
        total /= lengths.clamp(min=1)
    log_ratio = total.to(policy.dtype)
    log_c = accuracy.log() if log_likelihood is None else log_likelihood
    tempered = torch.zeros_like(log_ratio) if ratio.temper == 0 else ratio.temper * log_ratio
    log_rho = tempered.clamp(-ratio.clip, ratio.clip) + log_c

    padded, mask = _pad(log_rho, question_offsets, -torch.inf)
    top = padded.amax(1, keepdim=True) if padded.shape[1] else padded.new_zeros((padded.shape[0], 1))
    rho = (padded - top.clamp(min=torch.finfo(top.dtype).min)).exp()
    total_rho = rho.sum(1, keepdim=True)
    some = total_rho > 0
    weights = torch.where(some, rho / total_rho, 0.0)
    effective = torch.where(some[:, 0], total_rho[:, 0] ** 2 / (rho**2).sum(1), 0.0)
    count = torch.arange(1, padded.shape[1] + 1, device=padded.device, dtype=padded.dtype)
    bounds = padded.logcumsumexp(1) - count.log()
    return log_ratio, log_rho, weights[mask], bounds[mask], effective


def bounds_backward(grad: Tensor, log_rho: Tensor, bounds: Tensor, question_offsets: Tensor) -> Tensor:
    """`[S]` gradient in log rho: sum_(k >= j) g_k rho_j / sum_(i <= k) rho_i."""
    padded, mask = _pad(log_rho, question_offsets, -torch.inf)
    limits, _ = _pad(bounds, question_offsets, torch.inf)
    upstream, _ = _pad(grad, question_offsets, 0.0)
    width = padded.shape[1]
    count = torch.arange(1, width + 1, device=padded.device, dtype=padded.dtype)
    # a bound of -inf has only rho of zero below it: no gradient
    total = (limits + count.log()).masked_fill(torch.isneginf(limits), torch.inf)
    share = (padded[:, :, None] - total[:, None, :]).exp().triu()
    return torch.einsum("qjk,qk->qj", share, upstream)[mask]


def _pad(values: Tensor, question_offsets: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Ragged `[S]` -> (`[Q, K]` filled up with `fill`, mask of the real elements)."""
    counts = question_offsets.diff()
    width = int(counts.amax()) if counts.shape[0] else 0
    mask = torch.arange(width, device=values.device) < counts[:, None]
    padded = values.new_full(mask.shape, fill)
    padded[mask] = values
    return padded, mask
