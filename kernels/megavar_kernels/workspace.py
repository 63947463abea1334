"""How linear_logprob cuts its work into chunks, and the memory that this costs. Imports no triton: a planner asks
for these figures on machines without a device."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

# 2048 x 2048 fp32 logits are 16 MiB, which an H100's 50 MB of L2 hold beside the chunk of the weight, and 128
# GEMM tiles of 128 x 256 for its 132 SMs: one wave, 97 % full.
STAGE_TOKENS = 2048
STAGE_COLS = 2048
# Tokens per dlogits block. Up to here dW is one GEMM; beyond, a fp32 chunk of dW is added up over the blocks.
# The same on every rank of a group: each block is one all-reduce of dX.
BLOCK_TOKENS = 16384
# Target size of a dlogits block. Every vocabulary chunk reads and writes the fp32 dX once.
DLOGITS_BYTES = 128 << 20
# Tokens per fused forward launch: the tile statistics take 16 * 4096 * V / 128 bytes (78 MB at V=151936).
FUSED_TOKENS = 4096
# Columns per set of the fused kernels' statistics: half a tile.
FUSED_STATISTICS_COLS = 128
# Block of logits on the CPU: two of 256 x 1024 in fp32 are 2 MiB, what a core's own cache holds.
CPU_TOKENS = 256
CPU_COLS = 1024
# What keep="auto" holds on the CPU: a fixed size, for other processes make its free memory vary from call to call.
CPU_AUTO_KEEP_BYTES = 1 << 28
# Vectors over the tokens (masks, indices, targets, statistics and their merge), bytes per token.
TOKEN_BYTES = 160


class Workspace(NamedTuple):
    """Bytes beside inputs and outputs. `kept` is held between forward and backward, the others are peaks of a
    pass, kept exponentials not counted."""

    forward: int
    backward: int
    kept: int


def workspace_bytes(
    tokens: int,
    hidden_size: int,
    vocab_rows: int,
    dtype: torch.dtype,
    keep_bytes: int = 0,
    *,
    computed_tokens: int | None = None,
    fused: bool = False,
    device_type: str = "cuda",
) -> Workspace:
    """Memory of linear_logprob beside its inputs and outputs (logprob, entropy, dX and dW in `dtype`).

    Without a group: a group adds 16 bytes per token and rank, sequence parallelism the gathered hidden states
    and an fp32 dX of all tokens. cuBLAS's own workspace, which every layer shares, is not counted.

    Args:
        tokens, hidden_size, vocab_rows: T, H and the rows of the weight shard.
        dtype: of hidden and weight.
        keep_bytes: the limit for kept exponentials, 0 to recompute.
        computed_tokens: tokens with a gradient and a target that is not ignored; all where None.
        fused: whether the launch table gives the fused kernels.
        device_type: "cuda" or "cpu".
    """
    computed = tokens if computed_tokens is None else computed_tokens
    item = dtype.itemsize
    gathered = computed * hidden_size * item if computed < tokens else 0
    acc_item = max(item, 4)
    # the accumulator's storage becomes dX's own
    common = tokens * TOKEN_BYTES + gathered
    hidden_grad = max(computed * acc_item - tokens * item, 0) * hidden_size
    if device_type == "cpu":
        chunk = min(computed, CPU_TOKENS) * min(vocab_rows, CPU_COLS) * acc_item
        kept = min(keep_bytes, computed * vocab_rows * acc_item) if chunk else 0
        widened = (
            vocab_rows * hidden_size * acc_item if item < acc_item else 0
        )  # the weight, and again its dW
        rows = 2 * min(computed, CPU_TOKENS) * hidden_size * acc_item
        return Workspace(
            common + 2 * chunk + widened + rows, common + hidden_grad + 2 * chunk + 2 * widened + rows, kept
        )
    if computed == 0 or vocab_rows == 0:
        return Workspace(common, common + hidden_grad, 0)
    kept_tokens = tokens_kept(computed, vocab_rows, dtype, keep_bytes)
    stage = math.prod(stage_shape(computed, vocab_rows)) * 4
    forward = stage
    if fused:
        halves = 2 * math.ceil(vocab_rows / (2 * FUSED_STATISTICS_COLS))
        launch = min(computed - kept_tokens, FUSED_TOKENS)
        forward = max(stage if kept_tokens else 0, 16 * halves * launch)
    cols = dlogits_cols(computed, vocab_rows, item)
    dlogits = min(computed, BLOCK_TOKENS) * cols * item
    partial = min(cols, vocab_rows) * hidden_size * 4 if computed > BLOCK_TOKENS and item < 4 else 0
    backward = hidden_grad + dlogits + partial + (0 if fused else stage)
    return Workspace(common + forward, common + backward, kept_tokens * kept_token_bytes(vocab_rows, dtype))


def token_blocks(tokens: int) -> list[slice]:
    """The blocks of tokens that the backward pass goes through for every vocabulary chunk."""
    return [slice(at, min(at + BLOCK_TOKENS, tokens)) for at in range(0, tokens, BLOCK_TOKENS)]


def dlogits_cols(tokens: int, vocab_rows: int, itemsize: int) -> int:
    """Columns per dlogits block: a multiple of STAGE_COLS, chunks of nearly equal width."""
    stages = math.ceil(vocab_rows / STAGE_COLS)
    widest = max(DLOGITS_BYTES // (min(tokens, BLOCK_TOKENS) * itemsize * STAGE_COLS), 1)
    return math.ceil(stages / math.ceil(stages / widest)) * STAGE_COLS


def stage_shape(tokens: int, vocab_rows: int) -> tuple[int, int]:
    """Staging chunk of fp32 logits; its rows start on 16-byte boundaries."""
    return min(tokens, STAGE_TOKENS), min(STAGE_COLS, math.ceil(vocab_rows / 16) * 16)


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the kept exponentials, for inputs of `dtype`."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def kept_token_bytes(vocab_rows: int, dtype: torch.dtype) -> int:
    """One token's exponentials, and one maximum per STAGE_COLS columns."""
    return math.ceil(vocab_rows / 16) * 16 * kept_dtype(dtype).itemsize + 4 * math.ceil(
        vocab_rows / STAGE_COLS
    )


def tokens_kept(tokens: int, vocab_rows: int, dtype: torch.dtype, keep_bytes: int) -> int:
    """How many tokens' exponentials fit into keep_bytes."""
    return min(tokens, keep_bytes // kept_token_bytes(vocab_rows, dtype))
