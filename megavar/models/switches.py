"""Megatron-Core's own switches that a recipe may set: what changes speed, memory and precision, not the model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from fnmatch import fnmatch
from typing import Any, NamedTuple, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version
from pydantic import TypeAdapter, ValidationError

from megavar.data.suggest import did_you_mean
from megavar.errors import UserError, in_one_line
from megavar.models.architecture import Architecture
from megavar.models.parallel_layout import ParallelLayout

KEY = "trainer.megatron"

_PASSED = (
    "fp8",
    "fp8_recipe",
    "fp8_margin",
    "fp8_interval",
    "fp8_amax_*",
    "fp8_wgrad",
    "fp8_dot_product_attention",
    "fp8_multi_head_attention",
    "tp_only_amax_red",
    "first_last_layers_bf16",
    "num_layers_at_*_in_bf16",
    "moe_router_padding_for_quantization",
    "moe_permute_fusion",
    "moe_router_fusion",
    "recompute_modules",
    "distribute_saved_activations",
    "cpu_offloading*",
    "fine_grained_activation_offloading",
    "offload_modules",
    "min_offloaded_tensor_size",
    "memory_efficient_layer_norm",
    "activation_func_fp8_input_store",
    "disable_parameter_transpose_cache",
    "fused_single_qkv_rope",
    "fused_residual_rmsnorm",
    "fp32_residual_connection",
    "disable_bf16_reduced_precision_matmul",
    "deterministic_mode",
    "batch_p2p_sync",
    "deallocate_pipeline_outputs",
    "microbatch_group_size_per_vp_stage",
)
_WHY_NOT = {
    "fp8_param": "weights stay in bfloat16, which export, hand-over to engines and log-probs read",
    "fp8_output_proj": "the output projection is computed with its log-probs, in bfloat16",
    "*cuda_graph*": "Megatron-Core's CUDA graphs replay micro-batches of one shape, and these differ in length",
    "sequence_parallel": "use trainer.sequence_parallel",
    "recompute_granularity": "use trainer.recompute",
    "moe_aux_loss_coeff": "use trainer.expert_balance",
}
_FOREIGN = "it follows from the model and other keys of the recipe, or is for models and loops that are not megavar's"


class _Needs(NamedTuple):
    """What a kind of FP8 scaling runs on, as `transformer_engine.pytorch.quantization` checks it."""

    transformer_engine: str
    capability: tuple[int, int]
    gpus: str
    below: tuple[int, int] = (99, 0)


_INSTEAD = f"or leave {KEY}.fp8 out"
_FP8_NEEDS = {
    "delayed": _Needs("1.7", (8, 9), "Hopper or newer (or Ada)"),
    "tensorwise": _Needs("2.2", (8, 9), "Hopper or newer (or Ada)"),
    "blockwise": _Needs("2.3", (9, 0), "Hopper or newer"),
    "mxfp8": _Needs("2.1", (10, 0), "Blackwell (B200, B300)", below=(12, 0)),
}


def check_switches(switches: Mapping[str, Any]) -> None:
    """Raises UserError naming the first that Megatron-Core does not know, that is not passed on, or of another type."""
    known = [field.name for field in fields(TransformerConfig) if field.init]
    for name, value in switches.items():
        key = f"{KEY}.{name}"
        if name not in known:
            version = importlib.metadata.version("megatron-core")
            raise UserError(
                f"{key}: no field of Megatron-Core {version}'s TransformerConfig; {did_you_mean(name, known)}"
            )
        if not any(fnmatch(name, pattern) for pattern in _PASSED):
            why = next((why for pattern, why in _WHY_NOT.items() if fnmatch(name, pattern)), _FOREIGN)
            raise UserError(f"{key} is not passed on: {why}; leave it out")
        try:
            TypeAdapter(_HINTS[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"{key}: {error.errors()[0]['msg']}, got {value!r}") from None


_HINTS = get_type_hints(TransformerConfig)


def build_config(switches: Mapping[str, Any], **owned: Any) -> TransformerConfig:
    """owned: what follows from the model and from other keys of the recipe.

    Raises UserError: see `check_switches`, or what Megatron-Core says against the combination."""
    check_switches(switches)
    if not switches:
        return TransformerConfig(**owned)
    try:
        return TransformerConfig(**owned, **switches)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"[{KEY}]: Megatron-Core refuses it: {in_one_line(error)}") from None


def fp8_recipe(switches: Mapping[str, Any]) -> str | None:
    """Kind of FP8 scaling, Megatron-Core's default where `fp8` stands alone; None without FP8."""
    return switches.get("fp8_recipe", "delayed") if switches.get("fp8") else None


def token_multiple(switches: Mapping[str, Any]) -> int:
    """Tokens of which FP8's matrix products take a multiple; `get_fp8_align_size` in `megatron.core.fp8_utils`."""
    recipe = fp8_recipe(switches)
    return 1 if recipe is None else 32 if recipe == "mxfp8" else 16


def check_fp8(
    switches: Mapping[str, Any], architecture: Architecture, layout: ParallelLayout, *, dtype: str
) -> None:
    """Raises UserError where FP8 is asked for and no machine could run it."""
    recipe = fp8_recipe(switches)
    if recipe is None:
        return
    if recipe not in _FP8_NEEDS:
        raise UserError(f'{KEY}.fp8_recipe = "{recipe}" is not supported; expected {", ".join(_FP8_NEEDS)}')
    if dtype != "bfloat16":
        raise UserError(f'{KEY}.fp8 needs model.dtype = "bfloat16", not "{dtype}"; set it {_INSTEAD}')
    multiple = token_multiple(switches)
    for what, size in _sizes(architecture, layout):
        if size % multiple:
            raise UserError(
                f"{KEY}.fp8: {what} are {size} on a rank, FP8 ({recipe}) needs multiples of {multiple}; "
                f"use a smaller tp or etp {_INSTEAD}"
            )


def check_machine(
    switches: Mapping[str, Any],
    *,
    transformer_engine: str | None,
    capabilities: Callable[[], list[tuple[int, int]]],
) -> None:
    """Raises UserError where FP8 is asked for and this machine cannot run it.

    transformer_engine: its version here, if it is installed. capabilities: of the GPUs here.
    """
    recipe = fp8_recipe(switches)
    if recipe is None:
        return
    needs = _FP8_NEEDS[recipe]
    if transformer_engine is None:
        raise UserError(
            f"{KEY}.fp8 needs transformer-engine, which is not installed; install it "
            f'(pip install --no-build-isolation "transformer-engine[pytorch]") {_INSTEAD}'
        )
    if Version(transformer_engine) < Version(needs.transformer_engine):
        raise UserError(
            f'{KEY}.fp8_recipe = "{recipe}" needs transformer-engine {needs.transformer_engine} or newer, '
            f"{transformer_engine} is installed; upgrade it {_INSTEAD}"
        )
    found = capabilities()
    if not found:
        raise UserError(f"{KEY}.fp8 needs GPUs, {needs.gpus}, and there are none here; leave it out")
    for major, minor in found:
        if not needs.capability <= (major, minor) < needs.below:
            raise UserError(
                f'{KEY}.fp8_recipe = "{recipe}" needs {needs.gpus} GPUs; one here has compute capability '
                f"{major}.{minor}; choose another fp8_recipe {_INSTEAD}"
            )


def _sizes(a: Architecture, layout: ParallelLayout) -> Iterator[tuple[str, int]]:
    """Rows and columns of a rank's linear layers."""
    yield "columns of the hidden state", a.hidden_size
    yield "query heads' columns", a.num_heads * a.head_dim // layout.tp
    yield "QKV rows", (a.num_heads + 2 * a.num_kv_heads) * a.head_dim // layout.tp
    if a.is_moe:
        yield "an expert's columns", a.expert_ffn_size // layout.etp
    else:
        yield "the MLP's columns", a.ffn_size // layout.tp
