"""Makes the Triton interpreter stand in for a device: import before any kernel, under TRITON_INTERPRET=1.

The interpreter holds bf16 as uint16 bit patterns and multiplies those in tl.dot: operands are widened first.
The cuBLAS calls of the launchers have no CPU form with an fp32 result from bf16, so they get one here.
"""

import importlib
import os

import numpy as np

assert os.environ.get("TRITON_INTERPRET") == "1"

import triton.language as tl  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_create_dot = interpreter.InterpreterBuilder.create_dot


def _widen(operand):
    if operand.dtype.scalar == tl.bfloat16:
        data = (operand.data.astype(np.uint32) << 16).view(np.float32)
    elif operand.dtype.scalar == tl.float16:
        data = operand.data.astype(np.float32)
    else:
        return operand
    return interpreter.TensorHandle(data, tl.float32)


def _dot(self, a, b, d, *args, **kwargs):
    return _create_dot(self, _widen(a), _widen(b), d, *args, **kwargs)


interpreter.InterpreterBuilder.create_dot = _dot


def _matmul(a, b, out):
    with _disable_current_modes():  # temporaries that the device does not have
        out.copy_(a.float() @ b.float())


def _accumulate(total, a, b, alpha, beta):
    with _disable_current_modes():
        product = alpha * (a.float() @ b.float())
        total.copy_(total.float() * beta + product if beta else product)


def install(monkeypatch, *, fused: bool, stage_cols: int = 64, stage_tokens: int = 16) -> None:
    """Route CPU tensors to the Triton path, with chunks small enough that tests cross their boundaries."""
    from megavar_kernels import linear_logprob_triton, workspace

    front = importlib.import_module("megavar_kernels.linear_logprob")  # the package attribute is the function
    monkeypatch.setattr(front, "_backend", lambda hidden: linear_logprob_triton)
    for name, value in {
        "STAGE_COLS": stage_cols,
        "STAGE_TOKENS": stage_tokens,
        "BLOCK_TOKENS": 24,
        "DLOGITS_BYTES": 2 * 2 * stage_cols * 24,
        "FUSED_TOKENS": 32,
        "FUSED_STATISTICS_COLS": 16,
    }.items():
        monkeypatch.setattr(workspace, name, value)
    for name, value in {
        "FUSED_TILE": linear_logprob_triton.Tile(m=16, n=32, k=16, group_m=2, warps=4, stages=1),
        "uses_fused": lambda hidden: fused,
        "_matmul": _matmul,
        "_accumulate": _accumulate,
        "_multiprocessors": lambda tensor: 3,
    }.items():
        monkeypatch.setattr(linear_logprob_triton, name, value)
