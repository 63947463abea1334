"""Vocabulary-parallel pieces of linear_logprob: the merge of statistics and the collectives of the forward pass.

Every rank of the tensor-parallel group owns a contiguous range of vocabulary rows. A shard's softmax is
summed up, per token, by four numbers (the rows of a `[4, T]` tensor):

    m  largest logit of the shard                      (EMPTY where the shard has no row)
    s  sum_v exp(z_v - m)
    u  sum_v exp(z_v - m) * (z_v - m)
    t  the target's logit, -inf where another shard owns it

A MAX and SUM all-reduce cannot merge them (s and u are relative to each rank's own m), one all-gather can.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Finite stand-in for "no logit yet": exp underflows to 0 and 0 * EMPTY stays 0, where -inf would give NaN.
EMPTY = -1e30

# torch 2.13 renamed this; older releases know only the second name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def empty_statistics(tokens: int, like: Tensor) -> Tensor:
    """Statistics `[4, T]` of a shard without rows, in `like`'s dtype and device."""
    stats = like.new_zeros((4, tokens))
    stats[0] = EMPTY
    stats[3] = -torch.inf
    return stats


def merge_statistics(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `[R, 4, T]` shard statistics into (logprob, entropy, lse), each `[T]`.

    With M = max_r m_r, S = sum_r s_r e^(m_r - M) and U = sum_r e^(m_r - M) (u_r + s_r (m_r - M)):
    logprob = t - M - log S, entropy = log S - U / S, lse = M + log S.
    A target that no shard owns has logprob -inf.
    """
    m, s, u, t = stats.unbind(1)
    top = m.amax(0)
    shift = m - top
    scale = shift.exp()
    total = (s * scale).sum(0)
    cross = (scale * (u + s * shift)).sum(0)
    log_total = total.log()
    return t.amax(0) - top - log_total, log_total - cross / total, top + log_total


def gather_statistics(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' `[4, T]` statistics as `[R, 4, T]`: the only collective of the forward pass."""
    if group is None:
        return stats[None]
    return gather_rows(stats, group).view(-1, *stats.shape)


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate every rank's `[n, ...]` rows in rank order, `[R * n, ...]`."""
    out = rows.new_empty((rows.shape[0] * group.size(), *rows.shape[1:]))
    _all_gather(out, rows.contiguous(), group=group)
    return out


def largest_shard(rows: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """Most vocabulary rows that a rank of the group has: for sizes that all ranks must choose alike."""
    if group is None:
        return rows
    largest = torch.tensor(rows, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)
