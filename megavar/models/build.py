"""From an architecture and a layout to this rank's part of a Megatron-Core model, weights still to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megavar.errors import UserError
from megavar.models.architecture import Architecture
from megavar.models.modules import PackedAttention, RMSNorm, SwiGLU
from megavar.models.parallel_layout import ParallelLayout
from megavar.models.replay import enable_replay
from megavar.models.stack import has_transformer_engine
from megavar.models.switches import build_config
from megavar.parallel.groups import Groups, megatron_sizes


class Site(NamedTuple):
    """Where a model is going to be; `Groups` are when there are ranks."""

    layout: ParallelLayout
    device: torch.device


def transformer_config(
    architecture: Architecture,
    groups: Groups | Site,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool = False,
    recompute: str = "none",
    balance_coefficient: float = 0.0,
    switches: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Megatron's description of the decoder. Every fusion that needs a GPU is on exactly where there is one.

    balance_coefficient: of the auxiliary loss that spreads tokens evenly over experts (Switch Transformer,
    arXiv 2101.03961, Eq. 4), averaged over micro-batches; the few tokens of padding count too. switches: Megatron's
    own, as a recipe sets them.

    Raises UserError: switches that cannot be set, or that contradict.
    """
    layout, cuda = groups.layout, groups.device.type == "cuda"
    recomputations: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    mixture: dict[str, Any] = {}
    if architecture.is_moe:
        mixture = dict(
            num_moe_experts=architecture.num_experts,
            moe_router_topk=architecture.experts_per_token,
            moe_ffn_hidden_size=architecture.expert_ffn_size,
            # A softmax over the chosen experts' logits alone is theirs rescaled to sum to one.
            moe_router_pre_softmax=not architecture.norm_topk_prob,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="aux_loss" if balance_coefficient else "none",
            moe_aux_loss_coeff=balance_coefficient,
            moe_grouped_gemm=cuda and has_transformer_engine(),
        )
    return build_config(
        switches or {},
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **megatron_sizes(layout),
        sequence_parallel=sequence_parallel,
        # Packed micro-batches differ in length; stages tell each other the shape.
        variable_seq_lengths=True,
        # The only one for sequences of various lengths; checked for dense models too.
        moe_token_dispatcher_type="alltoall",
        # Interleaved, two stages are each other's predecessor and successor: sent in one batch, activations and
        # gradients of different lengths would meet the wrong receiver.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # Weights are always loaded; initialising them first would be wasted time and memory.
        perform_initialization=False,
        use_cpu_initialization=not cuda,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=cuda,
        # The switch's name is Megatron's; it takes the activation from the layer spec, on a CPU `SwiGLU`.
        use_te_activation_func=not cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=cuda,
        apply_rope_fusion=cuda and has_transformer_engine(),
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **recomputations[recompute],
        **mixture,
    )


def build_model(architecture: Architecture, config: TransformerConfig, groups: Groups) -> list[GPTModel]:
    """This rank's chunks of layers, one per virtual stage; the first of all has the embedding, the last the output.

    Parameters are uninitialised: load them with `megavar.models.hf_import` or a checkpoint. The vocabulary is
    padded to `architecture.padded_vocab(tp)`.

    Raises UserError: a layout that this model, or this machine's attention, does not have.
    """
    architecture.check_layout(groups.layout)
    if groups.cp > 1 and groups.device.type == "cuda" and not has_transformer_engine():
        raise UserError(
            f"cp={groups.cp}: on GPUs context parallelism needs transformer-engine; install it or use cp = 1"
        )
    last = groups.layout.vpp - 1
    chunks = [
        GPTModel(
            config,
            _layer_spec(config, chunk if last else None),
            vocab_size=architecture.padded_vocab(groups.tp),
            max_sequence_length=architecture.max_positions,
            pre_process=groups.pp_rank == 0 and chunk == 0,
            post_process=groups.is_last_stage and chunk == last,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            vp_stage=chunk if last else None,
        ).to(groups.device)
        for chunk in range(last + 1)
    ]
    if architecture.is_moe:
        for chunk in chunks:
            enable_replay(chunk, config)
    return chunks


def _layer_spec(config: TransformerConfig, chunk: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    if has_transformer_engine() and torch.cuda.is_available():
        return get_gpt_layer_with_transformer_engine_spec(
            config.num_moe_experts, config.moe_grouped_gemm, config.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        config.num_moe_experts, False, config.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # Stored under the name that transformer-engine's layers give it, which fuse no norm into a mixture.
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.use_te_activation_func:
        mlp = parts.mlp.keywords["submodules"]
        if config.num_moe_experts:
            mlp = mlp.experts.keywords["submodules"]
        mlp.activation_func = SwiGLU
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=RMSNorm
    )
