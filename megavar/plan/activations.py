"""Bytes that one micro-batch leaves on a rank between forward and backward, operator by operator.

Two stacks of operators exist (see `megavar.models.build`): Megatron-Core's local modules with torch's norms
and attention, and transformer-engine. Each figure below is what autograd keeps for the backward pass of the
operator named beside it; those of the torch stack are compared with a run in tests/plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megavar.models.architecture import Architecture
from megavar.models.parallel_layout import ParallelLayout

Recompute = Literal["none", "selective", "full"]
Stack = Literal["torch", "transformer-engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """What runs a layer."""

    stack: Stack
    device: Literal["cuda", "cpu"]
    item: int
    """Bytes of an activation: 2 in bfloat16, 4 in float32."""
    sequence_parallel: bool = False
    recompute: Recompute = "none"
    fp8: bool = False
    """Linear layers multiply in FP8; their weights stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """Bytes on one rank, for one layer and one micro-batch."""

    kept: int
    """From forward to backward."""
    recomputed: int
    """Kept again while the layer is recomputed, one layer at a time."""
    backward: int
    """Gradients alive at the peak of the layer's backward, beside what is kept."""
    forward: int
    """Alive at the peak of a forward pass that keeps nothing (scoring)."""


def layer_activations(
    architecture: Architecture, layout: ParallelLayout, operators: Operators, tokens: int
) -> LayerActivations:
    """tokens: of the whole micro-batch, of which a rank has 1 / cp, and between the tensor-parallel regions 1 / tp
    of that under sequence parallelism."""
    a, s = architecture, operators.item
    own = -(-tokens // layout.cp)
    outside = -(-own // layout.tp) if operators.sequence_parallel else own
    hidden = a.hidden_size * s * outside
    norms = 2 * _norm(operators, a.hidden_size, outside)
    attention, core, core_recomputed = _attention(a, layout, operators, own)
    mlp, mlp_backward, mlp_forward = _mlp(a, layout, operators, own, outside)
    # Under sequence parallelism the wgrads gather their input, one layer at a time.
    gathered = a.hidden_size * s * own if operators.sequence_parallel else 0
    whole = norms + attention + core + mlp
    backward = mlp_backward + hidden + gathered + _weight_gradient(a, layout) * s
    # The residual, a norm's output and the widest part.
    forward = 2 * hidden + gathered + max(mlp_forward, attention + core)
    match operators.recompute:
        case "none":
            return LayerActivations(kept=whole, recomputed=0, backward=backward, forward=forward)
        case "selective":
            kept = whole - core + core_recomputed
            return LayerActivations(kept=kept, recomputed=0, backward=backward, forward=forward)
        case "full":
            return LayerActivations(
                kept=hidden, recomputed=max(whole - hidden, 0), backward=backward, forward=forward
            )


def final_norm(architecture: Architecture, layout: ParallelLayout, operators: Operators, tokens: int) -> int:
    """Bytes that the norm before the output projection keeps."""
    own = -(-tokens // layout.cp)
    outside = -(-own // layout.tp) if operators.sequence_parallel else own
    return _norm(operators, architecture.hidden_size, outside)


def _norm(operators: Operators, width: int, tokens: int) -> int:
    if operators.stack == "transformer-engine":
        # input, output (of the linear layer behind it), one statistic
        return (2 * operators.item * width + 4) * tokens
    # input in float32, normalised input, output, one statistic
    return (4 * width + 2 * operators.item * width + 4) * tokens


def _attention(
    a: Architecture, layout: ParallelLayout, operators: Operators, tokens: int
) -> tuple[int, int, int]:
    """Bytes kept by (projections, norms and rotary embedding; core attention; core attention recomputed)."""
    s, heads = operators.item, a.num_heads // layout.tp
    q, kv = heads * a.head_dim, a.num_kv_heads // layout.tp * a.head_dim
    mixed = s * (q + 2 * kv)
    """The output of the QKV projection, kept as long as any part of it is."""
    statistics = 4 * heads
    if operators.stack == "transformer-engine":
        # QK norms: a copy of q, the mixed tensor for k. Values are always a part of the mixed tensor.
        around = (s * q if a.qk_norm else 0) + mixed
        core = s * (q + kv) + s * q + 2 * statistics
        # The output stays: it is the input of the output projection.
        recomputed = s * (q + kv) + s * q
        gathered = 2 * s * kv * layout.cp if layout.cp > 1 else 0
        return around * tokens, (core + gathered) * tokens, recomputed * tokens
    around = s * q  # input of the output projection
    if a.qk_norm:
        # input and normalised input of both norms; in float32 the input is the mixed tensor itself
        around += (s * q + mixed if s == 4 else 4 * (q + kv)) + s * (q + kv)
        around += 4 * (heads + a.num_kv_heads // layout.tp)
    around += 4 * s * a.head_dim  # sines and cosines, for q and for k
    # rows gathered for each block of sequences, its output, its log-sum-exp
    core = s * (2 * q + 2 * kv) + statistics
    # q and k after the rotary embedding, v as a part of the mixed tensor
    recomputed = s * (q + kv) + (0 if a.qk_norm and s == 4 else mixed)
    return around * tokens, core * tokens, recomputed * tokens


def _mlp(
    a: Architecture, layout: ParallelLayout, operators: Operators, tokens: int, outside: int
) -> tuple[int, int, int]:
    """Bytes (kept, gradients at the peak of its backward, alive in a forward pass that keeps nothing)."""
    s = operators.item
    # SwiGLU keeps its input (2f) and its output (f).
    widths = 3
    if not a.is_moe:
        f = s * a.ffn_size // layout.tp * tokens
        return widths * f, 2 * f, widths * f
    # Routing is taken as even. Every rank of an expert-tensor group has the group's tokens.
    slots = layout.etp * outside * a.experts_per_token
    f = s * a.expert_ffn_size // layout.etp * slots
    # Tokens as sent, as sorted by expert (input of fc1), and as they come back.
    carried = 3 * s * a.hidden_size * slots
    # Logits and probabilities in float32, the choice, and its mask.
    router = outside * (2 * 4 * a.num_experts + 5 * a.num_experts)
    return widths * f + carried + router, 2 * f + carried, widths * f + carried


def _weight_gradient(a: Architecture, layout: ParallelLayout) -> int:
    """Elements of the largest weight's gradient, alive until it is added to the gradient buffer."""
    mlp = 2 * a.expert_ffn_size // layout.etp if a.is_moe else 2 * a.ffn_size // layout.tp
    attention = (a.num_heads + 2 * a.num_kv_heads) // layout.tp * a.head_dim
    return max(mlp, attention) * a.hidden_size
