"""Hugging Face weights in blocks of FP8: the form in which DeepSeek-V3 and Qwen publish theirs.

The weight of a linear layer is float8_e4m3fn, and beside it `weight_scale_inv` [rows / 128, columns / 128] holds an
fp32 scale for each block, as `megavar.sync.fp8` makes them. SGLang, vLLM and transformers read it by config.json's
`quantization_config`; engines quantise activations as they go.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megavar.errors import UserError
from megavar.models.architecture import Architecture
from megavar.models.layout import LayoutTable
from megavar.sync.engine_layout import FP8_BLOCK, EngineLayout
from megavar.sync.fp8 import quantised

_SCALE = "_scale_inv"
_FP8 = EngineLayout(tp=1, dtype="fp8")


class Blocks:
    """The weights of a model that become blocks, quantised one at a time when they are read."""

    def __init__(self, table: LayoutTable, read: Callable[[str], torch.Tensor]) -> None:
        """read: a tensor by its Hugging Face name."""
        self.names = {source.name for t in table.tensors if _FP8.quantises(t) for source in t.sources}
        self._read_plain = read
        self._scales: dict[str, torch.Tensor] = {}

    def forms(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and types of what is written for a weight, to be read in this order."""
        scales = (shape[0] // FP8_BLOCK, shape[1] // FP8_BLOCK)
        return {name: (shape, torch.float8_e4m3fn), name + _SCALE: (scales, torch.float32)}

    def read(self, name: str) -> torch.Tensor:
        """One of `forms`. Raises UserError for a weight that is not finite."""
        if name in self._scales:
            return self._scales.pop(name)
        elements, scales = quantised(self._read_plain(name))
        if not scales.isfinite().all():
            raise UserError(f"{name} holds a NaN or an infinity; convert an earlier checkpoint")
        self._scales[name + _SCALE] = scales
        return elements

    def __contains__(self, name: str) -> bool:
        return name in self.names or name in self._scales


def check_widths(architecture: Architecture, hf: Path) -> None:
    """Raises UserError naming the first width of a linear layer that blocks of 128 do not divide."""
    a = architecture
    ffn = ("moe_intermediate_size", a.expert_ffn_size) if a.is_moe else ("intermediate_size", a.ffn_size)
    widths = {
        "hidden_size": a.hidden_size,
        ffn[0]: ffn[1],
        "head_dim * num_attention_heads": a.head_dim * a.num_heads,
        "head_dim * num_key_value_heads": a.head_dim * a.num_kv_heads,
    }
    for name, width in widths.items():
        if width % FP8_BLOCK:
            raise UserError(
                f"{hf / 'config.json'}: {name} is {width}, which blocks of {FP8_BLOCK} do not divide; this model "
                "cannot be quantised in blocks"
            )


def quantization_config(architecture: Architecture) -> dict[str, Any]:
    """Of config.json. Modules that stay as they are must be named, or readers expect blocks of them."""
    layers = range(architecture.num_layers) if architecture.is_moe else ()
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in layers)],
    }
