"""Reference of linear_logprob in plain torch: token chunks, fp32 (fp64 for fp64 inputs), any device.

CPU tensors are computed here; the Triton kernels are tested against it and it against fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .vocab_parallel import empty_statistics
from .workspace import CPU_TOKENS


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def statistics(
    hidden: Tensor, weight: Tensor, target: Tensor, inv_temperature: float, keep_bytes: int
) -> tuple[Tensor, list[Tensor]]:
    """Shard statistics `[4, T]` (see vocab_parallel) and the logits of the first chunks, up to keep_bytes.

    hidden `[T, H]`, weight `[V, H]`, target `[T]` row of `weight` or -1 where another shard owns it.
    """
    dtype = _compute_dtype(hidden)
    stats = empty_statistics(hidden.shape[0], hidden.new_empty((), dtype=dtype))
    kept: list[Tensor] = []
    if weight.shape[0] == 0:
        return stats, kept
    table = weight.to(dtype).t()
    for start in range(0, hidden.shape[0], CPU_TOKENS):
        rows = slice(start, start + CPU_TOKENS)
        z = (hidden[rows].to(dtype) @ table).mul_(inv_temperature)
        keep_bytes -= z.numel() * z.element_size()
        if keep_bytes >= 0:
            kept.append(z)
        _chunk_statistics(z, target[rows], stats[:, rows], in_place=keep_bytes < 0)
        del z  # before the next chunk's
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
    kept: list[Tensor],
    hidden_grad: Tensor | None,
    hidden_ready: Callable[[slice], None] | None,
    weight_grad: Tensor | None,
) -> None:
    """Write this shard's dX into `hidden_grad` `[T, H]`, add its dW into `weight_grad`; None skips either.

    dz = g_lp (1[y] - p) - g_H p (log p + entropy), dX = dz W / temperature, dW = dz^T X / temperature.
    `hidden_ready` is told which rows of dX are complete, in ascending order until all of them are.
    `kept` is what `statistics` returned; its chunks are not computed again.
    """
    dtype = _compute_dtype(hidden)
    table = weight.to(dtype)
    for index, start in enumerate(range(0, hidden.shape[0], CPU_TOKENS)):
        rows = slice(start, start + CPU_TOKENS)
        x = hidden[rows].to(dtype)
        if index < len(kept):
            log_p = kept[index] - lse[rows, None]
        else:
            log_p = (x @ table.t()).mul_(inv_temperature).sub_(lse[rows, None])
        entropy_data = None if grad_entropy is None else (entropy[rows], grad_entropy[rows])
        dz = _dlogits(log_p, target[rows], grad_logprob[rows], entropy_data).mul_(inv_temperature)
        del log_p
        if hidden_grad is not None:
            torch.mm(dz, table, out=hidden_grad[rows])
        if weight_grad is not None:
            weight_grad.addmm_(dz.t(), x)
        del dz
    if hidden_ready is not None:
        hidden_ready(slice(0, hidden.shape[0]))


def _chunk_statistics(z: Tensor, target: Tensor, stats: Tensor, in_place: bool) -> None:
    """Fill `stats` `[4, n]` from the logits `z` `[n, V]`, which are lost where in_place."""
    own_logit = z.gather(1, target.clamp(min=0).long()[:, None])[:, 0]
    stats[3] = own_logit.masked_fill(target < 0, -torch.inf)
    stats[0] = z.amax(1)
    shifted = z.sub_(stats[0, :, None]) if in_place else z - stats[0, :, None]
    e = shifted.exp()
    stats[1] = e.sum(1)
    stats[2] = e.mul_(shifted).sum(1)


def _dlogits(
    log_p: Tensor, target: Tensor, grad_logprob: Tensor, entropy_data: tuple[Tensor, Tensor] | None
) -> Tensor:
    """dz `[n, V]` from log p, which is lost. entropy_data: the entropy and its gradient."""
    dz = log_p.exp()
    if entropy_data is None:
        dz.mul_(-grad_logprob[:, None])
    else:
        entropy, grad_entropy = entropy_data
        slope = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
        dz.mul_(slope.add_(grad_logprob[:, None])).neg_()
    owned = (target >= 0).nonzero()[:, 0]
    dz[owned, target[owned].long()] += grad_logprob[owned]
    return dz


def new_weight_grad(weight: Tensor) -> Tensor:
    """Zeroed accumulator for dW `[V, H]`: fp32, or fp64 for fp64 weights."""
    return torch.zeros_like(weight, dtype=_compute_dtype(weight))


def one_pass_tokens(vocab_rows: int, block_bytes: int) -> int:
    """Tokens per block of the one-pass entry, whose fp32 logits are all kept."""
    return max(CPU_TOKENS, block_bytes // (4 * max(vocab_rows, 1)) // CPU_TOKENS * CPU_TOKENS)
