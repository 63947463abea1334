"""Log-probability and entropy of target tokens straight from hidden states, without the `[T, V]` logits.

    z = hidden @ weight^T / temperature,  p = softmax(z)
    logprob_t = z[t, y_t] - log sum_v exp(z[t, v])        entropy_t = - sum_v p[t, v] log p[t, v]

The per-token log-probabilities are the log pi and log q of equations 1, 3 and 6 of arXiv 2509.22637. Three
entries share one implementation: `linear_logprob` (autograd), `linear_logprob_forward` (scoring) and
`linear_logprob_forward_backward` (one pass, for gradients known beforehand). CPU tensors are computed by
linear_logprob_reference, CUDA tensors by linear_logprob_triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import linear_logprob_reference
from .arguments import INDEX_DTYPES, debug_checks, require_matrix, require_same_device, require_vector
from .hidden_grad import HiddenGrad
from .vocab_parallel import gather_rows, gather_statistics, largest_shard, merge_statistics
from .workspace import CPU_AUTO_KEEP_BYTES

Keep = Literal["auto", "none"] | int

# Share of the free device memory that keep="auto" may hold between forward and backward.
AUTO_KEEP_FRACTION = 1 / 8
# One pass holds the exponentials of one block of tokens; larger blocks save passes over the fp32 dW.
ONE_PASS_BLOCK_BYTES = 1 << 30
ALL = 1 << 62


@dataclass(frozen=True, slots=True)
class _Shard:
    """What does not change between forward and backward."""

    group: dist.ProcessGroup | None
    sequence_parallel: bool
    inv_temperature: float
    vocab_start: int
    rows: int  # rows of the weight shard inside the true vocabulary
    ignore_index: int
    entropy: bool


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    keep: Keep = "auto",
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of `target` under softmax(hidden @ weight^T / temperature).

    Differentiable in hidden and weight: dz = g_lp (1[y] - p) - g_H p (log p + entropy). Tokens whose two
    gradients are zero are left out of the backward GEMMs, ignored tokens out of all of them.

    Args:
        hidden: `[T, H]` bf16, fp16, fp32 (fp64 on the CPU), H % 8 == 0; `[T / R, H]` with sequence_parallel.
        weight: `[V_shard, H]`, this rank's rows of the output layer, dtype of hidden.
        target: `[T]` int32 or int64 global token ids, the same on every rank of the group.
        temperature: divides the logits; > 0.
        vocab_start: global id of the shard's first row.
        group: tensor-parallel group over which the vocabulary is split; None for the whole vocabulary.
        keep: memory for exponentials kept from forward to backward, which saves their recomputation:
            "auto" (an eighth of the free device memory; 256 MiB on the CPU), "none", or a number of bytes; the
            same on every rank of the group.
        sequence_parallel: hidden is this rank's slice of the tokens; forward all-gathers it and backward
            reduce-scatters its gradient.
        ignore_index: targets with this id give logprob 0, entropy 0 and no gradient.
        vocab_size: true vocabulary; rows with a global id from here on are padding, outside the softmax and
            without gradient.
        entropy: False leaves it out, which saves the CPU a third of the work on each logit; it is then zero and has
            no gradient.

    Returns:
        (logprob, entropy), each `[T]` fp32 (fp64 for fp64 inputs), in nats.

    Raises:
        TypeError: dtype of hidden, weight or target.
        ValueError: shape, contiguity or device of an argument, or a target outside the vocabulary (checked on
            the CPU, on a device under MEGAVAR_KERNELS_DEBUG=1; otherwise its logprob is -inf).
        RuntimeError: CUDA tensors without triton installed.
    """
    shard = _check(
        hidden,
        weight,
        target,
        temperature,
        vocab_start,
        group,
        sequence_parallel,
        ignore_index,
        vocab_size,
        entropy,
    )
    keep_bytes = _keep_bytes(keep, hidden)
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        keep_bytes = 0  # no backward pass will ask for them
    return _LinearLogprob.apply(hidden, weight, target, shard, keep_bytes)


@torch.no_grad()
def linear_logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` for scoring: same arguments and results, nothing saved for a backward pass."""
    shard = _check(
        hidden, weight, target, temperature, vocab_start, group, sequence_parallel, ignore_index, vocab_size
    )
    return _forward(hidden, weight, target, shard, keep_bytes=0)[:2]


@torch.no_grad()
def linear_logprob_forward_backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None = None,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward in one pass over the logits (6THV FLOP, where recomputation takes 8THV).

    For losses linear in the log-probs whose weights are known before the pass, as the detached weights rho~
    of equation 6: the gradients are those of sum_t grad_logprob_t logprob_t + grad_entropy_t entropy_t.

    Args:
        grad_logprob: `[T]` fp32, the same on every rank of the group (fp64 for fp64 inputs).
        grad_entropy: `[T]` fp32 or None for zero.
        weight_grad: `[V_shard, H]` fp32 accumulator that dW is added to; allocated where None.
        The others: see `linear_logprob`.

    Returns:
        (logprob `[T]` fp32, entropy `[T]` fp32, d hidden in hidden's shape and dtype, weight_grad). Tokens
        whose two gradients are zero are not computed: their logprob and entropy are 0.
    """
    shard = _check(
        hidden, weight, target, temperature, vocab_start, group, sequence_parallel, ignore_index, vocab_size
    )
    acc_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    for name, grad in (("grad_logprob", grad_logprob), ("grad_entropy", grad_entropy)):
        if grad is not None:
            require_vector(name, grad, target.shape[0], (acc_dtype,))
            require_same_device(name, grad, "hidden", hidden)
    if weight_grad is None:
        weight_grad = torch.zeros_like(weight, dtype=acc_dtype)
    else:
        require_matrix("weight_grad", weight_grad)
        require_same_device("weight_grad", weight_grad, "hidden", hidden)
        if weight_grad.shape != weight.shape or weight_grad.dtype != acc_dtype:
            raise ValueError(
                f"weight_grad: expected {acc_dtype} of shape {tuple(weight.shape)}, "
                f"got {weight_grad.dtype} of shape {tuple(weight_grad.shape)}"
            )

    backend = _backend(hidden)
    full = gather_rows(hidden, group) if sequence_parallel else hidden
    logprob = full.new_zeros(target.shape, dtype=acc_dtype)
    entropy = torch.zeros_like(logprob)
    live = _nonzero_rows((target != ignore_index) & _any_gradient(grad_logprob, grad_entropy))
    hidden_grad = HiddenGrad(full, live, acc_dtype, group, sequence_parallel)
    done = 0
    block_tokens = backend.one_pass_tokens(
        largest_shard(shard.rows, hidden.device, group), ONE_PASS_BLOCK_BYTES
    )
    for rows in live.split(block_tokens):
        x, y, g_lp = full[rows], target[rows], grad_logprob[rows]
        g_en = None if grad_entropy is None else grad_entropy[rows]
        logprob[rows], entropy[rows], lse, kept = _statistics(x, weight, y, shard, keep_bytes=ALL)

        def ready(part: slice, first: int = done) -> None:
            hidden_grad.ready(slice(first + part.start, first + part.stop))

        backend.gradients(
            x, weight[: shard.rows], _local_target(y, shard), lse, entropy[rows], g_lp, g_en,
            shard.inv_temperature, kept, hidden_grad.accumulator[done : done + len(rows)], ready,
            weight_grad[: shard.rows],
        )  # fmt: skip
        done += len(rows)
    return logprob, entropy, hidden_grad.finish(), weight_grad


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, shard, keep_bytes):
        logprob, entropy, lse, kept, rows = _forward(hidden, weight, target, shard, keep_bytes)
        ctx.set_materialize_grads(False)
        if not shard.entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(hidden, weight, target, lse, entropy, rows)
        # not `kept` itself: a smaller shard can keep tokens where another has no room, but dX takes equal rows
        ctx.shard, ctx.kept, ctx.drop_rows = shard, kept, keep_bytes == 0
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy):
        if grad_logprob is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, target, lse, entropy, rows = ctx.saved_tensors
        shard, kept = ctx.shard, ctx.kept
        ctx.kept = (
            None  # this node lives on for as long as the loss does; a second backward computes them again
        )
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(grad_entropy)

        full = gather_rows(hidden, shard.group) if shard.sequence_parallel else hidden
        if ctx.drop_rows:  # kept exponentials belong to the forward's rows, which must then stay as they were
            live = (target != shard.ignore_index) & _any_gradient(grad_logprob, grad_entropy)
            lse = _scatter(lse, rows, target.shape[0])
            rows = _nonzero_rows(live)
            lse = _take(lse, rows)
        x, y, entropy, grad_logprob, grad_entropy = (
            _take(tensor, rows) for tensor in (full, target, entropy, grad_logprob, grad_entropy)
        )
        backend = _backend(hidden)
        hidden_grad = None
        if want_hidden:
            hidden_grad = HiddenGrad(full, rows, lse.dtype, shard.group, shard.sequence_parallel)
        weight_grad = backend.new_weight_grad(weight) if want_weight else None
        backend.gradients(
            x, weight[: shard.rows], _local_target(y, shard), lse, entropy, grad_logprob, grad_entropy,
            shard.inv_temperature, kept,
            hidden_grad.accumulator if want_hidden else None,
            hidden_grad.ready if want_hidden else None,
            weight_grad[: shard.rows] if want_weight else None,
        )  # fmt: skip
        del full, x  # a gathered copy need not outlive the GEMMs
        return (
            hidden_grad.finish() if want_hidden else None,
            weight_grad.to(weight.dtype) if want_weight else None,
            None, None, None,
        )  # fmt: skip


def _forward(
    hidden: Tensor, weight: Tensor, target: Tensor, shard: _Shard, keep_bytes: int
) -> tuple[Tensor, Tensor, Tensor, object, Tensor]:
    """(logprob `[T]`, entropy `[T]`, lse of the computed rows, what was kept of them, the computed rows)."""
    full = gather_rows(hidden, shard.group) if shard.sequence_parallel else hidden
    rows = _nonzero_rows(target != shard.ignore_index)
    x, y = _take(full, rows), _take(target, rows)
    logprob, entropy, lse, kept = _statistics(x, weight, y, shard, keep_bytes)
    tokens = target.shape[0]
    return _scatter(logprob, rows, tokens), _scatter(entropy, rows, tokens), lse, kept, rows


def _statistics(
    hidden: Tensor, weight: Tensor, target: Tensor, shard: _Shard, keep_bytes: int
) -> tuple[Tensor, Tensor, Tensor, object]:
    """(logprob, entropy, lse, kept) of tokens none of which is ignored."""
    stats, kept = _backend(hidden).statistics(
        hidden,
        weight[: shard.rows],
        _local_target(target, shard),
        shard.inv_temperature,
        keep_bytes,
        shard.entropy,
    )
    if target.numel() == 0:
        return stats[0], stats[1], stats[2], kept
    logprob, entropy, lse = merge_statistics(gather_statistics(stats, shard.group))
    if not shard.entropy:
        entropy.zero_()
    if debug_checks(target) and torch.isneginf(logprob).any():
        bad = target[torch.isneginf(logprob)].tolist()
        raise ValueError(f"target: {len(bad)} ids are outside the vocabulary, the first is {bad[0]}")
    return logprob, entropy, lse, kept


def _local_target(target: Tensor, shard: _Shard) -> Tensor:
    """Row of the shard as int32, -1 where another shard owns the target.

    Without the -1, the padding columns of a ragged last tile would alias the next shard's ids.
    """
    local = target - shard.vocab_start
    return torch.where((local >= 0) & (local < shard.rows), local, -1).to(torch.int32)


def _any_gradient(grad_logprob: Tensor, grad_entropy: Tensor | None) -> Tensor:
    return grad_logprob != 0 if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)


def _nonzero_rows(live: Tensor) -> Tensor:
    """Indices of the live tokens. Waits for the device once: the GEMM sizes depend on the count."""
    return live.nonzero()[:, 0]


def _take(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """`tensor[rows]` for ascending rows, without a copy where they are all of them."""
    if tensor is None or rows.shape[0] == tensor.shape[0]:
        return tensor if tensor is None else tensor.contiguous()
    return tensor.index_select(0, rows)


def _scatter(values: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """Inverse of `_take`: `[T, ...]` with zeros outside `rows`."""
    if rows.shape[0] == tokens:
        return values
    return values.new_zeros((tokens, *values.shape[1:])).index_copy_(0, rows, values)


def _backend(hidden: Tensor) -> ModuleType:
    """The module that computes `statistics` and `gradients` for tensors on this device."""
    if hidden.device.type == "cpu":
        return linear_logprob_reference
    try:
        from . import linear_logprob_triton
    except ImportError as error:
        raise RuntimeError(f"hidden: is on {hidden.device}, which needs the triton package") from error
    return linear_logprob_triton


def _keep_bytes(keep: Keep, hidden: Tensor) -> int:
    if keep == "none":
        return 0
    if keep == "auto":
        if hidden.device.type != "cuda":
            return CPU_AUTO_KEEP_BYTES
        free = torch.cuda.mem_get_info(hidden.device)[0]
        cached = torch.cuda.memory_reserved(hidden.device) - torch.cuda.memory_allocated(hidden.device)
        return max(int((free + cached) * AUTO_KEEP_FRACTION), 1)  # never 0 on some ranks of a group alone
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0:
        return keep
    raise ValueError(f'keep: expected "auto", "none" or a number of bytes, got {keep!r}')


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    vocab_start: int,
    group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    ignore_index: int,
    vocab_size: int | None,
    entropy: bool = True,
) -> _Shard:
    require_matrix("hidden", hidden)
    require_matrix("weight", weight)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: dtype {weight.dtype} differs from hidden's {hidden.dtype}")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: {weight.shape[1]} columns, but hidden has {hidden.shape[1]}")
    if hidden.shape[1] == 0 or hidden.shape[1] % 8:
        raise ValueError(f"hidden: hidden size {hidden.shape[1]} is not a positive multiple of 8")
    if sequence_parallel and group is None:
        raise ValueError("group: sequence_parallel needs the tensor-parallel group")
    tokens = hidden.shape[0] * (group.size() if sequence_parallel else 1)
    require_vector("target", target, tokens, INDEX_DTYPES)
    require_same_device("weight", weight, "hidden", hidden)
    require_same_device("target", target, "hidden", hidden)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: must be positive and finite, got {temperature}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start: must not be negative, got {vocab_start}")
    if vocab_size is not None and vocab_size <= 0:
        raise ValueError(f"vocab_size: must be positive, got {vocab_size}")
    if hidden.dtype == torch.float64 and hidden.device.type != "cpu":
        raise TypeError(f"hidden: float64 is computed on the CPU alone, got it on {hidden.device}")
    _backend(hidden)  # a missing triton shows before any work
    rows = weight.shape[0] if vocab_size is None else min(max(vocab_size - vocab_start, 0), weight.shape[0])
    return _Shard(group, sequence_parallel, 1.0 / temperature, vocab_start, rows, ignore_index, entropy)
