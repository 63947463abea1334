"""Checks of caller arguments: every message names the argument at fault."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def debug_checks(tensor: Tensor) -> bool:
    """Whether checks that read tensor values run: always on the CPU, on a device only with
    MEGAVAR_KERNELS_DEBUG=1 (they wait for the device)."""
    return tensor.device.type == "cpu" or os.environ.get("MEGAVAR_KERNELS_DEBUG") == "1"


def require_matrix(name: str, tensor: Tensor) -> None:
    """A dense row-major matrix of a supported floating dtype."""
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(tensor.shape)}")
    require_dtype(name, tensor, FLOAT_DTYPES)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {tensor.stride()}")


def require_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """One of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def require_vector(name: str, tensor: Tensor, length: int | None, dtypes: tuple[torch.dtype, ...]) -> None:
    """A contiguous vector of `length` elements (any length where None)."""
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        wanted = "[n]" if length is None else f"[{length}]"
        raise ValueError(f"{name}: expected shape {wanted}, got {list(tensor.shape)}")
    require_dtype(name, tensor, dtypes)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {tensor.stride()}")


def require_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """`tensor` on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: is on {tensor.device}, but {other_name} is on {other.device}")
