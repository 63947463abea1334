"""Layers as Megatron-Core's transformer-engine spec puts them together, out of stubs that need no transformer-engine.

The spec is Megatron's own: which norm is fused into which linear layer, which stands alone, under which names they are
stored. The leaves are stubs with the parameters and the extra state of transformer-engine's and the arithmetic of ours.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavar.models.modules import PackedAttention, RMSNorm, SwiGLU


class StubTENorm(RMSNorm):
    """transformer-engine's norm is a module with an extra state, which is an empty tensor without FP8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("extra state is not stored")


class StubTELayerNormLinear(ColumnParallelLinear):
    """A norm and the linear layer behind it as one module."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **more: Any) -> None:
        super().__init__(input_size, output_size, config=config, **more)
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = config.layernorm_epsilon

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Any:
        y = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return super().forward(self.layer_norm_weight * y.to(x.dtype), *more, **named)


class StubTESpecProvider(LocalSpecProvider):
    """Megatron's `TESpecProvider` with stubs; experts one after the other, whose stored form grouped ones share."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return StubTELayerNormLinear

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type[StubTENorm]:
        return StubTENorm

    def core_attention(self) -> type:
        return PackedAttention

    def activation_func(self) -> type[SwiGLU]:
        return SwiGLU


def te_layer_spec(config: TransformerConfig, chunk: int | None) -> TransformerBlockSubmodules:
    """In the place of `megavar.models.build._layer_spec`."""
    with mock.patch.object(gpt_layer_specs, "TESpecProvider", StubTESpecProvider):
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, False, config.qk_layernorm, use_te_activation_func=True
        )
    layers = [layer] * get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=StubTENorm)
