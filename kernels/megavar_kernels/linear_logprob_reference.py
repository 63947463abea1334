"""Reference of linear_logprob in plain torch: blocks of logits that stay in a core's cache, fp32 (fp64 for fp64
inputs), any device.

CPU tensors are computed here; the Triton kernels are tested against it and it against fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .vocab_parallel import empty_statistics
from .workspace import CPU_COLS, CPU_TOKENS

_TINY_SUM = 1e-20


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class Kept(NamedTuple):
    """Exponentials of a chunk of tokens, for the backward pass."""

    exponentials: Tensor
    """`[n, V]`: exp(logit - the block's top)."""
    tops: Tensor
    """`[blocks, n]`: the largest logit up to and including each block of vocabulary rows."""


def statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    inv_temperature: float,
    keep_bytes: int,
    entropy: bool = True,
) -> tuple[Tensor, list[Kept]]:
    """Shard statistics `[4, T]` (see vocab_parallel) and the exponentials of the first chunks, up to keep_bytes.

    hidden `[T, H]`, weight `[V, H]`, target `[T]` row of `weight` or -1 where another shard owns it. entropy: False
    leaves out what only the entropy needs, the third row.
    """
    dtype = _compute_dtype(hidden)
    stats = empty_statistics(hidden.shape[0], hidden.new_empty((), dtype=dtype))
    kept: list[Kept] = []
    if weight.shape[0] == 0:
        return stats, kept
    table = weight.to(dtype)
    blocks = _Blocks(hidden.shape[0], table)
    for start in range(0, hidden.shape[0], CPU_TOKENS):
        rows = slice(start, start + CPU_TOKENS)
        x = hidden[rows].to(dtype) * inv_temperature
        keep_bytes -= x.shape[0] * table.shape[0] * x.element_size()
        chunk = x.new_empty((x.shape[0], table.shape[0])) if keep_bytes >= 0 else None
        part = stats[:, rows]
        tops = []
        if chunk is not None or entropy or not _add_unshifted(x, table, blocks, part):
            for cols in blocks:
                z = torch.mm(x, table[cols].t(), out=blocks.first(x.shape[0], cols))
                e = blocks.second(x.shape[0], cols) if chunk is None else chunk[:, cols]
                tops.append(_add_block(z, e, part, entropy))
        if chunk is not None:
            kept.append(Kept(chunk, torch.stack(tops)))
        own_logit = (x * table[target[rows].clamp(min=0).long()]).sum(1)
        part[3] = own_logit.masked_fill(target[rows] < 0, -torch.inf)
    return stats, kept


def gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    inv_temperature: float,
    kept: list[Kept] | None,
    hidden_grad: Tensor | None,
    hidden_ready: Callable[[slice], None] | None,
    weight_grad: Tensor | None,
) -> None:
    """Write this shard's dX into `hidden_grad` `[T, H]`, add its dW into `weight_grad`; None skips either.

    dz = g_lp (1[y] - p) - g_H p (log p + entropy), dX = dz W / temperature, dW = dz^T X / temperature.
    `hidden_ready` is told which rows of dX are complete, in ascending order until all of them are.
    `kept` is what `statistics` returned; its chunks are not computed again.
    """
    kept = kept or []
    dtype = _compute_dtype(hidden)
    table = weight.to(dtype)
    blocks = _Blocks(hidden.shape[0], table)
    if hidden_grad is not None:
        hidden_grad.zero_()
    for index, start in enumerate(range(0, hidden.shape[0], CPU_TOKENS)):
        rows = slice(start, start + CPU_TOKENS)
        x = hidden[rows].to(dtype)
        scaled = x * inv_temperature
        g_lp = grad_logprob[rows] * inv_temperature
        g_en = None if grad_entropy is None else grad_entropy[rows] * inv_temperature
        for number, cols in enumerate(blocks):
            log_p, p = blocks.first(x.shape[0], cols), blocks.second(x.shape[0], cols)
            if index < len(kept):
                share = (kept[index].tops[number] - lse[rows]).exp()
                torch.mul(kept[index].exponentials[:, cols], share[:, None], out=p)
                if g_en is not None:
                    torch.clamp(p, min=torch.finfo(dtype).tiny, out=log_p).log_()
            else:
                torch.exp(torch.mm(scaled, table[cols].t(), out=log_p).sub_(lse[rows, None]), out=p)
            dz = _dlogits(p, log_p, entropy[rows], g_lp, g_en)
            inside = (target[rows] >= cols.start) & (target[rows] < cols.stop)
            owned = inside.nonzero()[:, 0]
            dz[owned, target[rows][owned].long() - cols.start] += g_lp[owned]
            if hidden_grad is not None:
                hidden_grad[rows].addmm_(dz, table[cols])
            if weight_grad is not None:
                weight_grad[cols].addmm_(dz.t(), x)
    if hidden_ready is not None:
        hidden_ready(slice(0, hidden.shape[0]))


class _Blocks:
    """Ranges of vocabulary rows, and the two buffers that every block of logits is worked on in."""

    def __init__(self, tokens: int, table: Tensor) -> None:
        self._rows = table.shape[0]
        size = min(tokens, CPU_TOKENS) * min(self._rows, CPU_COLS)
        self._buffers = table.new_empty(size), table.new_empty(size)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self._rows, CPU_COLS):
            yield slice(start, min(start + CPU_COLS, self._rows))

    def first(self, tokens: int, cols: slice) -> Tensor:
        return self._view(0, tokens, cols)

    def second(self, tokens: int, cols: slice) -> Tensor:
        return self._view(1, tokens, cols)

    def _view(self, index: int, tokens: int, cols: slice) -> Tensor:
        width = cols.stop - cols.start
        return self._buffers[index][: tokens * width].view(tokens, width)


def _add_unshifted(x: Tensor, table: Tensor, blocks: _Blocks, stats: Tensor) -> bool:
    """Sum up exp(z) as they are, two passes less over each block. False, and nothing added, where a token's logits
    are too large or too small for that.

    Relative precision does not depend on the sum's size, and what underflows is below 1e-38 of at least `_TINY_SUM`.
    """
    total = torch.zeros_like(stats[1])
    for cols in blocks:
        total += torch.mm(x, table[cols].t(), out=blocks.first(x.shape[0], cols)).exp_().sum(1)
    if not bool(((total > _TINY_SUM) & total.isfinite()).all()):
        return False
    stats[0], stats[1] = 0.0, total
    return True


def _add_block(z: Tensor, e: Tensor, stats: Tensor, entropy: bool) -> Tensor:
    """Merge a block of logits `z` `[n, B]`, which are lost, into the first three of `stats` `[4, n]`.

    e: of z's shape, becomes exp(z - top). Returns top, `[n]`.
    """
    m, s, u = stats[0], stats[1], stats[2]
    top = torch.maximum(m, z.amax(1))
    torch.exp(z.sub_(top[:, None]), out=e)
    shift = m - top
    scale = shift.exp()
    total = e.sum(1)
    if entropy:
        u.copy_(scale * (u + s * shift) + z.mul_(e).sum(1))
    s.copy_(scale * s + total)
    m.copy_(top)
    return top


def _dlogits(
    p: Tensor, log_p: Tensor, entropy: Tensor, grad_logprob: Tensor, grad_entropy: Tensor | None
) -> Tensor:
    """dz `[n, B]` but for the targets' own term, in p's place; log_p is lost, and not read without grad_entropy."""
    if grad_entropy is None:
        return p.mul_(-grad_logprob[:, None])
    slope = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
    return p.mul_(slope.add_(grad_logprob[:, None])).neg_()


def new_weight_grad(weight: Tensor) -> Tensor:
    """Zeroed accumulator for dW `[V, H]`: fp32, or fp64 for fp64 weights."""
    return torch.zeros_like(weight, dtype=_compute_dtype(weight))


def one_pass_tokens(vocab_rows: int, block_bytes: int) -> int:
    """Tokens per block of the one-pass entry, whose fp32 exponentials are all kept."""
    return max(CPU_TOKENS, block_bytes // (4 * max(vocab_rows, 1)) // CPU_TOKENS * CPU_TOKENS)
