"""Hugging Face weight files written and read tensor by tensor, where `hf_export` and `hf_import` hold a model's.

Format: https://huggingface.co/docs/safetensors/index (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megavar.models.hf_files import StoredTensor
from megavar.models.parts import Stream

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write_safetensors(
    stream: Stream,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """One file of the tensors named, with their shapes and types, in that order; `read` gives each in its turn."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)))
    stream.write(text)
    for name, (shape, dtype) in tensors.items():
        tensor = read(name)
        assert tensor.shape == shape and tensor.dtype == dtype, name
        stream.write(as_bytes(tensor))
        del tensor  # before the next is read


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements' own bytes, not copied; tensor: contiguous, in host memory."""
    return tensor.flatten().view(torch.uint8).numpy().data


def read_stored(stored: StoredTensor, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor, in memory alone (no file stays mapped)."""
    rows = range(*slice(start, stop).indices(stored.shape[0]))
    out = torch.empty((len(rows), *stored.shape[1:]), dtype=getattr(torch, stored.dtype))
    with stored.file.open("rb") as file:
        file.seek(stored.start + rows.start * (stored.stop - stored.start) // stored.shape[0])
        got = file.readinto(as_bytes(out))  # type: ignore[attr-defined]
    assert got == out.nbytes, stored.file
    return out
