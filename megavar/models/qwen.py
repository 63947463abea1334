"""Rows of Qwen2.5, Qwen3 dense and Qwen3 MoE, as their checkpoints name tensors on the hub and on disk.

Transformers 5 fuses a layer's experts in memory (`mlp.experts.gate_up_proj`) yet reads and writes one tensor
per expert, so one form serves both.
"""

from __future__ import annotations

from megavar.models.architecture import Architecture
from megavar.models.layout import Dim, Kind, Row, Source, Stage

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."


def rows(architecture: Architecture) -> tuple[Row, ...]:
    """Rows of any Qwen model that `Architecture` can describe."""
    return (
        _vocab("embedding.word_embeddings.weight", "model.embed_tokens.weight", stage="embedding"),
        _norm("input_layernorm", "input_layernorm"),
        *_attention(architecture),
        _norm("pre_mlp_layernorm", "post_attention_layernorm"),
        *(_mixture() if architecture.is_moe else _mlp("mlp", "mlp", "ffn")),
        Row(
            name="decoder.final_layernorm.weight",
            kind="replicated",
            stage="final",
            sources=(Source("model.norm.weight", ("hidden",)),),
        ),
        # Tied embeddings: a last stage that is not the first holds a copy of the embedding.
        _vocab("output_layer.weight", "model.embed_tokens.weight", stage="final", tied_copy=True)
        if architecture.tied
        else _vocab("output_layer.weight", "lm_head.weight", stage="final"),
    )


def _vocab(name: str, hf_name: str, *, stage: Stage, tied_copy: bool = False) -> Row:
    sources = (Source(hf_name, ("vocab", "hidden")),)
    return Row(name=name, kind="vocab", stage=stage, sources=sources, tied_copy=tied_copy)


def _layer(name: str, kind: Kind, *sources: tuple[str, tuple[Dim, ...]]) -> Row:
    return Row(
        name=_MEGATRON + name,
        kind=kind,
        stage="layer",
        sources=tuple(Source(_HF + hf_name, dims) for hf_name, dims in sources),
    )


def _norm(name: str, hf_name: str, dim: Dim = "hidden") -> Row:
    return _layer(f"{name}.weight", "replicated", (f"{hf_name}.weight", (dim,)))


def _attention(architecture: Architecture) -> list[Row]:
    def qkv(suffix: str, *inputs: Dim) -> Row:
        projections: tuple[tuple[str, Dim], ...] = (("q", "q"), ("k", "kv"), ("v", "kv"))
        sources = [(f"self_attn.{name}_proj.{suffix}", (out, *inputs)) for name, out in projections]
        return _layer(f"self_attention.linear_qkv.{suffix}", "qkv", *sources)

    found = [qkv("weight", "hidden")]
    if architecture.qkv_bias:
        found.append(qkv("bias"))
    if architecture.qk_norm:
        found += [_norm(f"self_attention.{x}_layernorm", f"self_attn.{x}_norm", "head_dim") for x in "qk"]
    out = _layer("self_attention.linear_proj.weight", "row", ("self_attn.o_proj.weight", ("hidden", "q")))
    return [*found, out]


def _mlp(name: str, hf_name: str, width: Dim) -> list[Row]:
    wide: tuple[Dim, ...] = (width, "hidden")
    gate, up = (f"{hf_name}.gate_proj.weight", wide), (f"{hf_name}.up_proj.weight", wide)
    return [
        _layer(f"{name}.linear_fc1.weight", "gate_up", gate, up),
        _layer(f"{name}.linear_fc2.weight", "row", (f"{hf_name}.down_proj.weight", ("hidden", width))),
    ]


def _mixture() -> list[Row]:
    router = _layer("mlp.router.weight", "replicated", ("mlp.gate.weight", ("experts", "hidden")))
    return [router, *_mlp("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", "expert_ffn")]
