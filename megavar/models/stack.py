"""What computes a model here: which attention, norms and fused modules, chosen by device and installed packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import megavar.parallel  # noqa: F401  before Megatron, which it adapts to a machine without CUDA
from megavar.models.switches import fp8_recipe


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def transformer_engine_version() -> str | None:
    """None where it is not installed."""
    return importlib.metadata.version("transformer_engine") if has_transformer_engine() else None


def foreign_apex() -> str | None:
    """Where a package named apex lies that is not NVIDIA's, such as PyPI's; None where there is none."""
    found = importlib.util.find_spec("apex")
    places = list(found.submodule_search_locations or [found.origin or "?"]) if found else []
    if any((Path(place) / "optimizers" / "fused_adam.py").is_file() for place in places):
        return None
    return places[0] if places else None


def describe_stack(device: torch.device, *, mixture: bool, switches: Mapping[str, Any] | None = None) -> str:
    """One line for people: each part and who computes it. switches: Megatron-Core's own that a recipe sets."""
    from megatron.core import optimizer

    cuda, recipe = device.type == "cuda", fp8_recipe(switches or {})
    engine = transformer_engine_version() if cuda else None
    if engine:
        attention = norms = activation = f"transformer-engine {engine}"
    else:
        attention, norms = "torch's flash kernels, sequence by sequence", "torch"
        activation = "megatron-core, fused by torch.compile" if cuda else "megavar, fused"
    adam = optimizer.Adam
    parts = {
        "attention": attention,
        "norms": norms,
        "SwiGLU": activation,
        **({"linear layers": f"FP8, {recipe} scaling"} if recipe else {}),
        **({"experts": "grouped GEMM" if engine else "one after the other"} if mixture else {}),
        "log-probs": "Triton" if cuda else "torch, in blocks",
        "optimizer": f"{adam.__module__}.{adam.__name__}",
    }
    remarks = [device.type, *(["transformer-engine is not installed"] if cuda and not engine else [])]
    if (place := foreign_apex()) is not None:
        remarks.append(f"{place} is not NVIDIA's apex and is ignored: pip uninstall apex")
    return "; ".join(f"{part}: {who}" for part, who in parts.items()) + f" ({'; '.join(remarks)})"
