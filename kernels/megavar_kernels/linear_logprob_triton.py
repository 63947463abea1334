"""Launchers of the linear_logprob kernels for CUDA tensors, and the table that chooses between the variants.

Same functions as linear_logprob_reference. Memory beside inputs and outputs: one staging chunk of fp32 logits
(16 MiB) or tile statistics (fused), in backward also one dlogits chunk (256 MiB) and the fp32 dX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import linear_logprob_kernels as kernels
from .devices import on_device_of_first
from .vocab_parallel import empty_statistics

# 2048 x 2048 fp32 logits are 16 MiB, which an H100's 50 MB of L2 hold beside the chunk of the weight, and 128
# GEMM tiles of 128 x 256 for its 132 SMs: one wave, 97 % full.
STAGE_TOKENS = 2048
STAGE_COLS = 2048
# Target size of the dlogits of one vocabulary chunk. Every chunk reads and writes the fp32 dX once.
DLOGITS_BYTES = 256 << 20
# Tokens per fused forward launch: the tile statistics take 16 * 4096 * V / 128 bytes (78 MB at V=151936).
FUSED_TOKENS = 4096
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
    hidden: Tensor, weight: Tensor, target: Tensor, inv_temperature: float, keep_bytes: int
) -> tuple[Tensor, Kept | None]:
    """Shard statistics `[4, T]` fp32 and the exponentials of as many tokens as fit into keep_bytes.

    Arguments as in linear_logprob_reference.statistics.
    """
    tokens, rows = hidden.shape[0], weight.shape[0]
    stats = empty_statistics(tokens, hidden.new_empty((), dtype=torch.float32))
    if tokens == 0 or rows == 0:
        return stats, None
    kept = _new_kept(hidden, rows, keep_bytes)
    first_fused = tokens
    if uses_fused(hidden):
        first_fused = 0 if kept is None else kept.tokens
        for start in range(first_fused, tokens, FUSED_TOKENS):
            part = slice(start, start + FUSED_TOKENS)
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
    hidden_ready: Callable[[Tensor], None] | None,
    weight_grad: Tensor | None,
) -> None:
    """Add dW into `weight_grad` and hand dX `[T, H]` fp32 to `hidden_ready` ahead of the last dW GEMM.

    Arguments as in linear_logprob_reference.gradients.
    """
    tokens, rows = hidden.shape[0], weight.shape[0]
    hidden_grad = hidden.new_zeros(hidden.shape, dtype=torch.float32) if hidden_ready else None
    if tokens == 0 or rows == 0:
        if hidden_ready:
            hidden_ready(hidden_grad)
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

    cols = _dlogits_cols(tokens, rows, hidden.element_size())
    dlogits = hidden.new_empty((tokens, cols))
    for col0 in range(0, rows, cols):
        w = weight[col0 : col0 + cols]
        dz = dlogits[:, : w.shape[0]]
        token_data = (target, lse, entropy, grad_logprob, grad_entropy)
        _dlogits(hidden, w, token_data, inv_temperature, col0, kept, dz)
        if hidden_grad is not None:
            _accumulate(hidden_grad, dz, w, alpha)
            if col0 + cols >= rows:
                hidden_ready(hidden_grad)
        if weight_grad is not None:
            _accumulate(weight_grad[col0 : col0 + cols], dz.t(), hidden, alpha)


def new_weight_grad(weight: Tensor) -> Tensor:
    """Zeros `[V, H]` in weight's dtype: each element comes from one GEMM over all tokens, which accumulates
    in fp32 and rounds once."""
    return torch.zeros_like(weight)


def one_pass_tokens(vocab_rows: int, block_bytes: int) -> int:
    """Tokens per block of the one-pass entry, whose exponentials are all kept."""
    return max(STAGE_TOKENS, block_bytes // (2 * max(vocab_rows, 1)) // STAGE_TOKENS * STAGE_TOKENS)


def _new_kept(hidden: Tensor, rows: int, keep_bytes: int) -> Kept | None:
    dtype = torch.float32 if hidden.dtype == torch.float32 else torch.bfloat16
    chunks = triton.cdiv(rows, STAGE_COLS)
    stride = triton.cdiv(rows, 16) * 16  # rows start on 16-byte boundaries
    tokens = min(hidden.shape[0], keep_bytes // (stride * dtype.itemsize + 4 * chunks))
    if tokens == 0:
        return None
    return Kept(
        hidden.new_empty((tokens, stride), dtype=dtype),
        hidden.new_empty((chunks, tokens), dtype=torch.float32),
    )


def _dlogits_cols(tokens: int, rows: int, itemsize: int) -> int:
    """Columns per dlogits chunk: a multiple of STAGE_COLS, chunks of nearly equal width."""
    stages = triton.cdiv(rows, STAGE_COLS)
    widest = max(DLOGITS_BYTES // (tokens * itemsize * STAGE_COLS), 1)
    chunks = triton.cdiv(stages, widest)
    return triton.cdiv(stages, chunks) * STAGE_COLS


def _chunked_statistics(
    hidden: Tensor, weight: Tensor, target: Tensor, scale: float, stats: Tensor, kept: Kept | None
) -> None:
    """Statistics of hidden's tokens, the first of `stats` and `target`."""
    stage = _new_stage(hidden, weight)
    kept_tokens = 0 if kept is None else kept.tokens
    for chunk, col0 in enumerate(range(0, weight.shape[0], STAGE_COLS)):
        w = weight[col0 : col0 + STAGE_COLS]
        for part, keep in _parts(kept_tokens, hidden.shape[0]):
            z = stage[: part.stop - part.start, : w.shape[0]]
            _matmul(hidden[part], w.t(), z)
            kernels.chunk_statistics[(z.shape[0],)](
                z, target[part], stats[:, part],
                kept.exponentials[part, col0:] if keep else None,
                kept.maxima[chunk, part] if keep else None,
                stats.stride(0), z.shape[1], col0, scale, z.stride(0),
                kept.exponentials.stride(0) if keep else 0,
                KEEP=keep, BLOCK=STAGE_COLS, num_warps=STATISTICS_WARPS, enable_fp_fusion=True,
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
    for start in range(0, weight.shape[0], STAGE_COLS):
        w = weight[start : start + STAGE_COLS]
        for part, keep in _parts(kept_tokens, kept_tokens if fused else tokens):
            out = dz[part, start : start + STAGE_COLS]
            at = col0 + start
            if keep:
                z = kept.exponentials[part, at : at + w.shape[0]]
            else:
                z = stage[: out.shape[0], : w.shape[0]]
                _matmul(hidden[part], w.t(), z)
            target, lse, entropy, grad_logprob, grad_entropy = _rows(token_data, part)
            kernels.chunk_dlogits[(out.shape[0],)](
                z, kept.maxima[at // STAGE_COLS, part] if keep else None,
                target, lse, entropy, grad_logprob, grad_entropy, out,
                w.shape[0], at, scale, z.stride(0), out.stride(0),
                KEPT=keep, ENTROPY=grad_entropy is not None, BLOCK=STAGE_COLS,
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
        (slice(start, min(start + STAGE_TOKENS, stop)), keep)
        for first, stop, keep in bounds
        for start in range(first, stop, STAGE_TOKENS)
    ]


def _rows(token_data: tuple[Tensor | None, ...], part: slice) -> tuple[Tensor | None, ...]:
    return tuple(None if data is None else data[part] for data in token_data)


def _new_stage(hidden: Tensor, weight: Tensor) -> Tensor:
    """Staging chunk of fp32 logits."""
    tokens = min(hidden.shape[0], STAGE_TOKENS)
    return hidden.new_empty(
        (tokens, min(STAGE_COLS, triton.cdiv(weight.shape[0], 16) * 16)), dtype=torch.float32
    )


def _matmul(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in fp32 from a's dtype."""
    torch.mm(a, b, out_dtype=torch.float32, out=out)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha * a @ b; total is fp32, or of a's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=alpha)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, out=total)


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
