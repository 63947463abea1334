"""nvidia-modelopt's unified checkpoints, weights alone quantised: no calibration data is needed. For TensorRT-LLM; what
SGLang reads is written by `fp8_blocks`."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from megavar.commands import convert
from megavar.commands.fp8_blocks import check_widths
from megavar.commands.ranks import check_new_directory
from megavar.commands.stored import Stored
from megavar.errors import UserError
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.companions import copy_companions
from megavar.models.families import layout_table

Format = Literal["modelopt-fp8", "modelopt-int4"]

_CONFIGS: dict[Format, str] = {
    "modelopt-fp8": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt-int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}
"""modelopt's own: E4M3 in blocks of 128 x 128 (`FP8_PB_WO`); INT4 in groups of 128 columns (`W4A16_AWQ`)."""


def quantize(stored: Stored, out: Path, kind: Format, *, max_file_bytes: int) -> None:
    """Write `out` with linear layers quantised, embeddings, norms, routers and the output layer as they are.

    stored: a Hugging Face directory, or a Megatron checkpoint, which is converted to one first.

    Raises UserError: modelopt is not installed, a width that blocks do not divide, too little memory.
    """
    architecture = read_architecture(stored.hf)
    _check(architecture, stored.hf, kind)
    check_new_directory(out)
    source, plain = stored.hf, None
    if not stored.is_hf:
        plain = out.parent / f".{out.name}.plain"
        source = convert.to_hf(stored, plain, dtype=None, max_file_bytes=max_file_bytes).partial
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    copy_companions(source, partial)
    count = _export(source, partial, kind, max_file_bytes)
    os.replace(partial, out)
    if plain is not None:
        shutil.rmtree(source)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {count} weights in {kind}, {size / 2**20:.1f} MiB in all")


def _check(architecture: Architecture, hf: Path, kind: Format) -> None:
    if importlib.util.find_spec("modelopt") is None:
        raise UserError(f"--quantize {kind}: nvidia-modelopt is not installed; pip install nvidia-modelopt")
    if architecture.is_moe:
        raise UserError(
            f"--quantize {kind}: {hf} is a mixture, of which modelopt's export is not checked; --quantize fp8 takes any"
        )
    check_widths(architecture, hf)
    itemsize = getattr(torch, architecture.dtype).itemsize
    shapes = layout_table(architecture).checkpoint.values()
    need = int(sum(torch.Size(shape).numel() for shape in shapes) * itemsize * 1.7)
    free = psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"--quantize {kind}: modelopt loads the model, which takes {need / 2**30:.0f} GiB; "
            f"{free / 2**30:.0f} GiB are free; use a larger machine"
        )


def _export(source: Path, out: Path, kind: Format, max_file_bytes: int) -> int:
    """Returns the number of quantised weights."""
    import megavar.parallel  # noqa: F401  before Megatron, which modelopt imports where it is installed

    import modelopt.torch.quantization as mtq  # isort: skip
    from modelopt.torch.export import export_hf_checkpoint  # isort: skip
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = mtq.quantize(model, getattr(mtq, _CONFIGS[kind]))
    count = sum(
        module.weight_quantizer.is_enabled
        for module in model.modules()
        if hasattr(module, "weight_quantizer")
    )
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out, max_shard_size=max_file_bytes)
    return count
