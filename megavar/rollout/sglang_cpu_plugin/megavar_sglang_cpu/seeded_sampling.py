"""Sampling that is a function of (seed, position) of each request, in plain PyTorch.

SGLang does this with a Triton kernel on a GPU and with `sgl_kernel` on its own CPU engine. The hash is the
same MurmurHash3 of (seed, position, column), so a seed draws the same noise here as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mix(state: Tensor, block: Tensor) -> Tensor:
    """One 32-bit block of MurmurHash3; int64 tensors whose low 32 bits count (a product may wrap above)."""
    block = (block * 0xCC9E2D51) & _LOW
    block = ((block << 15) | (block >> 17)) & _LOW
    block = (block * 0x1B873593) & _LOW
    state = state ^ block
    state = ((state << 13) | (state >> 19)) & _LOW
    return (state * 5 + 0xE6546B64) & _LOW


def murmur_hash(seed: Tensor, positions: Tensor, columns: int) -> Tensor:
    """int64 [B, columns] in [0, 2**32): the hash of the 16 bytes (seed int64 [B], position [B], column)."""
    state = torch.zeros_like(seed)
    for block in (seed & _LOW, (seed >> 32) & _LOW, positions.to(torch.int64) & _LOW):
        state = _mix(state, block)
    state = _mix(state[:, None], torch.arange(columns, device=seed.device)[None, :])
    state = state ^ 16
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & _LOW
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & _LOW
    return state ^ (state >> 16)


def multinomial_with_seed(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    """One column per row, drawn with probability exp(logprobs) by the Gumbel maximum.

    logprobs: [B, V], -inf allowed. seed: int64 [B]. positions: int [B]. Returns int64 [B, 1].
    """
    uniform = murmur_hash(seed, positions, logprobs.shape[1]).double() / _LOW
    # Both ends are cut: 0 would give -inf and 1 would give +inf whatever the log-prob.
    exponential = uniform.log_().clamp_(min=torch.finfo(torch.float64).min, max=-(2.0**-32)).neg_()
    return (logprobs.double() - exponential.log_()).argmax(dim=1, keepdim=True)
