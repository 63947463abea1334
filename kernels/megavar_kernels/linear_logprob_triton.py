"""Launchers of the linear_logprob kernels for CUDA tensors, and the table that chooses between the variants.

Same functions as linear_logprob_reference. Chunk sizes and the memory that they take: workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import linear_logprob_kernels as kernels
from . import workspace as sizes
from .devices import on_device_of_first
from .vocab_parallel import empty_statistics

# mm and addmm with out_dtype came in torch 2.8, but addmm refused a fp32 addend to 16-bit factors until
# pytorch/pytorch#167931 (November 2025). There is no other way to an fp32 result of the same speed and memory,
# so an older torch is an error, not another path.
TORCH_FLOOR = (2, 11)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_FLOOR:
    raise RuntimeError(
        f"hidden: CUDA tensors need torch >= {'.'.join(map(str, TORCH_FLOOR))} (torch.addmm with out_dtype), "
        f"this is {torch.__version__}"
    )

# A row of 2048 logits beside its exponentials: with 4 warps, the ptxas of Triton 3.6 stops at 64 registers on
# sm_80 and spills.
STATISTICS_WARPS = 2
# Block of reduce_statistics.
REDUCE_TOKENS, REDUCE_TILES = 32, 64


class Tile(NamedTuple):
    """Block sizes and launch options of the fused kernels."""

    m: int
    n: int
    k: int
    group_m: int
    warps: int
    stages: int


# No spills and <= 227 KiB of shared memory on both Triton versions; see the table in docs/kernels.md.
FUSED_TILE = Tile(m=128, n=256, k=64, group_m=16, warps=8, stages=4)

# compute capability -> hidden size below which the fused kernels are used (bf16 only); chunked elsewhere.
# From the cost model in docs/kernels.md: the staging traffic of the chunked variant costs a fixed time per
# logit, which a short inner product does not hide.
FUSED_BELOW_HIDDEN = {(9, 0): 3072}


class Kept(NamedTuple):
    """Exponentials of the first `n` tokens, exp(z - maxima) with one maximum per STAGE_COLS columns."""

    exponentials: Tensor  # [n, V rounded up to 16], bf16 (fp32 for fp32 inputs)
    maxima: Tensor  # [ceil(V / STAGE_COLS), n] fp32

    @property
    def tokens(self) -> int:
        return self.exponentials.shape[0]


def uses_fused(hidden: Tensor) -> bool:
    """Whether the table gives the fused kernels for this dtype, hidden size and device."""
    if hidden.dtype != torch.bfloat16:
        return False
    return hidden.shape[1] < FUSED_BELOW_HIDDEN.get(torch.cuda.get_device_capability(hidden.device), 0)


@on_device_of_first
def statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    inv_temperature: float,
    keep_bytes: int,
    entropy: bool = True,
) -> tuple[Tensor, Kept | None]:
    """Shard statistics `[4, T]` fp32 and the exponentials of as many tokens as fit into keep_bytes.

    Arguments as in linear_logprob_reference.statistics; the kernels sum up what entropy needs at no cost.
    """
    tokens, rows = hidden.shape[0], weight.shape[0]
    stats = empty_statistics(tokens, hidden.new_empty((), dtype=torch.float32))
    if tokens == 0 or rows == 0:
        return stats, None
    kept = _new_kept(hidden, rows, keep_bytes)
    first_fused = tokens
    if uses_fused(hidden):
        first_fused = 0 if kept is None else kept.tokens
        for start in range(first_fused, tokens, sizes.FUSED_TOKENS):
            part = slice(start, start + sizes.FUSED_TOKENS)
            _fused_statistics(hidden[part], weight, target[part], inv_temperature, stats[:, part])
    _chunked_statistics(hidden[:first_fused], weight, target, inv_temperature, stats, kept)
    return stats, kept


@on_device_of_first
def gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    inv_temperature: float,
    kept: Kept | None,
    hidden_grad: Tensor | None,
    hidden_ready: Callable[[slice], None] | None,
    weight_grad: Tensor | None,
) -> None:
    """Write dX into `hidden_grad` `[T, H]` fp32, add dW into `weight_grad`; None skips either.

    Arguments as in linear_logprob_reference.gradients. A block of dX is announced before the dW GEMM of that
    block, so that its sum over the group runs beside it and beside the blocks that follow.
    """
    tokens, rows = hidden.shape[0], weight.shape[0]
    blocks = sizes.token_blocks(tokens)
    if rows == 0:
        if hidden_grad is not None:
            hidden_grad.zero_()
            for part in blocks:
                hidden_ready(part)
        return
    if tokens == 0:
        return
    alpha = inv_temperature
    if hidden.dtype == torch.float16:  # gradients of a mean over tokens would underflow in fp16 dlogits
        largest = grad_logprob.abs().amax()
        if grad_entropy is not None:
            largest = torch.maximum(largest, grad_entropy.abs().amax())
        unit = largest.item() or 1.0
        alpha *= unit
        grad_logprob = grad_logprob / unit
        grad_entropy = None if grad_entropy is None else grad_entropy / unit

    cols = sizes.dlogits_cols(tokens, rows, hidden.element_size())
    dlogits = hidden.new_empty((min(tokens, sizes.BLOCK_TOKENS), cols))
    partial = None
    if weight_grad is not None and weight_grad.dtype != torch.float32 and len(blocks) > 1:
        partial = hidden.new_empty((min(cols, rows), hidden.shape[1]), dtype=torch.float32)
    for col0 in range(0, rows, cols):
        w = weight[col0 : col0 + cols]
        for block, part in enumerate(blocks):
            x = hidden[part]
            dz = dlogits[: x.shape[0], : w.shape[0]]
            token_data = _rows((target, lse, entropy, grad_logprob, grad_entropy), part)
            _dlogits(x, w, token_data, inv_temperature, col0, _kept_part(kept, part), dz)
            if hidden_grad is not None:
                _accumulate(hidden_grad[part], dz, w, alpha, beta=int(col0 > 0))
                if col0 + cols >= rows:
                    hidden_ready(part)
            if partial is not None:
                _accumulate(partial[: w.shape[0]], dz.t(), x, alpha, beta=int(block > 0))
            elif weight_grad is not None:
                _accumulate(weight_grad[col0 : col0 + cols], dz.t(), x, alpha, beta=1)
        if partial is not None:
            weight_grad[col0 : col0 + cols] += partial[: w.shape[0]]


def new_weight_grad(weight: Tensor) -> Tensor:
    """Zeros `[V, H]` in weight's dtype: each element is summed over all tokens in fp32 and rounded once."""
    return torch.zeros_like(weight)


def one_pass_tokens(vocab_rows: int, block_bytes: int) -> int:
    """Tokens per block of the one-pass entry, whose exponentials are all kept."""
    tokens = block_bytes // (2 * max(vocab_rows, 1))
    return max(sizes.STAGE_TOKENS, tokens // sizes.STAGE_TOKENS * sizes.STAGE_TOKENS)


def _new_kept(hidden: Tensor, rows: int, keep_bytes: int) -> Kept | None:
    tokens = sizes.tokens_kept(hidden.shape[0], rows, hidden.dtype, keep_bytes)
    if tokens == 0:
        return None
    stride = triton.cdiv(rows, 16) * 16  # rows start on 16-byte boundaries
    return Kept(
        hidden.new_empty((tokens, stride), dtype=sizes.kept_dtype(hidden.dtype)),
        hidden.new_empty((triton.cdiv(rows, sizes.STAGE_COLS), tokens), dtype=torch.float32),
    )


def _kept_part(kept: Kept | None, part: slice) -> Kept | None:
    """What is kept of the tokens `part`."""
    if kept is None or part.start >= kept.tokens:
        return None
    return Kept(kept.exponentials[part], kept.maxima[:, part])


def _chunked_statistics(
    hidden: Tensor, weight: Tensor, target: Tensor, scale: float, stats: Tensor, kept: Kept | None
) -> None:
    """Statistics of hidden's tokens, the first of `stats` and `target`."""
    stage = _new_stage(hidden, weight)
    kept_tokens = 0 if kept is None else kept.tokens
    for chunk, col0 in enumerate(range(0, weight.shape[0], sizes.STAGE_COLS)):
        w = weight[col0 : col0 + sizes.STAGE_COLS]
        for part, keep in _parts(kept_tokens, hidden.shape[0]):
            z = stage[: part.stop - part.start, : w.shape[0]]
            _matmul(hidden[part], w.t(), z)
            kernels.chunk_statistics[(z.shape[0],)](
                z, target[part], stats[:, part],
                kept.exponentials[part, col0:] if keep else None,
                kept.maxima[chunk, part] if keep else None,
                stats.stride(0), z.shape[1], col0, scale, z.stride(0),
                kept.exponentials.stride(0) if keep else 0,
                KEEP=keep, BLOCK=sizes.STAGE_COLS, num_warps=STATISTICS_WARPS, enable_fp_fusion=True,
            )  # fmt: skip


def _dlogits(
    hidden: Tensor,
    weight: Tensor,
    token_data: tuple[Tensor | None, ...],
    scale: float,
    col0: int,
    kept: Kept | None,
    dz: Tensor,
) -> None:
    """Fill dz `[T, n]` with the dlogits of `weight` `[n, H]`, whose first row is row col0 of the shard."""
    tokens = hidden.shape[0]
    kept_tokens = 0 if kept is None else kept.tokens
    fused = uses_fused(hidden)
    if fused and kept_tokens < tokens:
        rest = slice(kept_tokens, tokens)
        _fused_dlogits(hidden[rest], weight, _rows(token_data, rest), scale, col0, dz[rest])
    stage = None if fused else _new_stage(hidden, weight)
    for start in range(0, weight.shape[0], sizes.STAGE_COLS):
        w = weight[start : start + sizes.STAGE_COLS]
        for part, keep in _parts(kept_tokens, kept_tokens if fused else tokens):
            out = dz[part, start : start + sizes.STAGE_COLS]
            at = col0 + start
            if keep:
                z = kept.exponentials[part, at : at + w.shape[0]]
            else:
                z = stage[: out.shape[0], : w.shape[0]]
                _matmul(hidden[part], w.t(), z)
            target, lse, entropy, grad_logprob, grad_entropy = _rows(token_data, part)
            kernels.chunk_dlogits[(out.shape[0],)](
                z, kept.maxima[at // sizes.STAGE_COLS, part] if keep else None,
                target, lse, entropy, grad_logprob, grad_entropy, out,
                w.shape[0], at, scale, z.stride(0), out.stride(0),
                KEPT=keep, ENTROPY=grad_entropy is not None, BLOCK=sizes.STAGE_COLS,
                num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip


def _fused_statistics(hidden: Tensor, weight: Tensor, target: Tensor, scale: float, stats: Tensor) -> None:
    tile = FUSED_TILE
    tokens, rows = hidden.shape[0], weight.shape[0]
    halves = 2 * triton.cdiv(rows, tile.n)
    tiles = hidden.new_empty((4, halves, tokens), dtype=torch.float32)
    programs = min(_multiprocessors(hidden), triton.cdiv(tokens, tile.m) * halves // 2)
    kernels.fused_statistics[(programs,)](
        TensorDescriptor.from_tensor(hidden, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        target, tiles, tokens, rows, hidden.shape[1], scale, programs,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP_M=tile.group_m,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
    kernels.reduce_statistics[(triton.cdiv(tokens, REDUCE_TOKENS),)](
        tiles, stats, halves, tokens, stats.stride(0), BT=REDUCE_TOKENS, BR=REDUCE_TILES,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    stats[3].masked_fill_(target < 0, -torch.inf)


def _fused_dlogits(
    hidden: Tensor,
    weight: Tensor,
    token_data: tuple[Tensor | None, ...],
    scale: float,
    col0: int,
    dz: Tensor,
) -> None:
    tile = FUSED_TILE
    tokens, rows = hidden.shape[0], weight.shape[0]
    programs = min(_multiprocessors(hidden), triton.cdiv(tokens, tile.m) * triton.cdiv(rows, tile.n))
    kernels.fused_dlogits[(programs,)](
        TensorDescriptor.from_tensor(hidden, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(dz, [tile.m, tile.n // 2]),
        *token_data, tokens, rows, hidden.shape[1], col0, scale, programs,
        ENTROPY=token_data[-1] is not None,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP_M=tile.group_m,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip


def _parts(kept_tokens: int, tokens: int) -> list[tuple[slice, bool]]:
    """Token slices of at most STAGE_TOKENS, each wholly kept or wholly not, and which of the two it is."""
    bounds = ((0, kept_tokens, True), (kept_tokens, tokens, False))
    return [
        (slice(start, min(start + sizes.STAGE_TOKENS, stop)), keep)
        for first, stop, keep in bounds
        for start in range(first, stop, sizes.STAGE_TOKENS)
    ]


def _rows(token_data: tuple[Tensor | None, ...], part: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if data is None else data[part] for data in token_data)


def _new_stage(hidden: Tensor, weight: Tensor) -> Tensor:
    """Staging chunk of fp32 logits."""
    return hidden.new_empty(sizes.stage_shape(hidden.shape[0], weight.shape[0]), dtype=torch.float32)


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in fp32 from a's dtype."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, alpha: float, beta: int) -> None:
    """total = beta total + alpha a @ b; total is fp32, or of a's dtype. With beta 0 it may be uninitialised."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=alpha, beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=total)


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
