"""Memory of one GPU of each pipeline stage, in training and in scoring.

Ranks of a stage differ in nothing that matters here, so a stage stands for all of them. The peak of a training
step is what stays (weights, gradients, optimizer, an engine on the same GPU) and what the micro-batches in
flight have kept, plus the larger of two moments: the output projection with its loss, or the backward pass
of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from megavar_kernels.workspace import CPU_AUTO_KEEP_BYTES, workspace_bytes

from megavar.models.architecture import Architecture
from megavar.models.parallel_layout import ParallelLayout
from megavar.plan.activations import Operators, final_norm, layer_activations
from megavar.plan.parameters import Parameters, stage_parameters

GIB = 1 << 30
CUDA_RESERVE = 2 * GIB
"""CUDA context, NCCL buffers, cuBLAS workspace: what no tensor accounts for. An assumption."""
FRAGMENTATION = 0.05
"""Of activations and workspace, lost between the allocator's blocks. An assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one GPU of a pipeline stage at the peak."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Kept by the micro-batches in flight."""
    logprob: int = 0
    """Output projection and loss: linear_logprob's workspace, the gradients it returns, the final norm."""
    layer: int = 0
    """One layer at work: what it recomputes, its gradients; in scoring its intermediate values."""
    engine: int = 0
    """Weights and KV cache of an engine on the same GPU."""
    reserve: int = 0
    """See CUDA_RESERVE and FRAGMENTATION."""

    @property
    def peak(self) -> int:
        """`logprob` and `layer` are not at work at the same time."""
        stays = (f.name for f in fields(self) if f.name not in ("logprob", "layer"))
        return sum(getattr(self, name) for name in stays) + max(self.logprob, self.layer)


def weight_bytes(parameters: Parameters, operators: Operators) -> int:
    """With FP8 the two copies that transformer-engine keeps of a projection from micro-batch to micro-batch, for the
    product with its input and for that with the gradient of its output."""
    return operators.item * parameters.total + (2 * parameters.linear if operators.fp8 else 0)


def optimizer_bytes(parameters: Parameters, layout: ParallelLayout, item: int) -> int:
    """Adam's two float32 moments, and float32 weights beside bfloat16 ones, as Megatron-Core's distributed
    optimizer shares them out."""
    each = 8 + (4 if item == 2 else 0)
    dense, expert = layout.dp * layout.cp, layout.edp
    return each * -(-parameters.dense // dense) + each * -(-parameters.expert // expert)


def chunks_in_flight(layout: ParallelLayout, stage: int, micro_batches: int) -> int:
    """Forward passes of a model chunk (a stage's 1/vpp) that wait for their backward, at most.

    The warm-up of Megatron-Core's schedules (`get_pp_rank_microbatches`) and the one pass after it.
    """
    if layout.pp == 1:
        return 1
    if layout.vpp == 1:
        return min(micro_batches, layout.pp - stage)
    warm_up = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp
    return min(micro_batches * layout.vpp, warm_up + 1)


def training_memory(
    architecture: Architecture,
    layout: ParallelLayout,
    operators: Operators,
    *,
    tokens: int,
    micro_batches: int,
    engine: int = 0,
) -> tuple[StageMemory, ...]:
    """Every stage. tokens: of the largest micro-batch; micro_batches: of a data-parallel rank in a step."""
    layer = layer_activations(architecture, layout, operators, tokens)
    head = _head(architecture, layout, operators, tokens)
    boundary = 2 * _hidden(architecture, layout, operators, tokens) if layout.pp > 1 else 0
    layers = architecture.num_layers // (layout.pp * layout.vpp)
    stages = []
    for stage, parameters in enumerate(stage_parameters(architecture, layout)):
        kept = chunks_in_flight(layout, stage, micro_batches) * (layers * layer.kept + boundary)
        at_work = layer.recomputed + layer.backward
        last = stage == layout.pp - 1
        if last and architecture.tied and layout.pp == 1:
            # Its gradient waits for the embedding's, which comes last.
            at_work += _output_weight(architecture, layout) * operators.item
        stages.append(
            StageMemory(
                weights=weight_bytes(parameters, operators),
                gradients=4 * parameters.total,
                optimizer=optimizer_bytes(parameters, layout, operators.item),
                activations=kept,
                logprob=head if last else 0,
                layer=at_work,
                engine=engine,
                reserve=_reserve(operators, kept + max(at_work, head if last else 0)),
            )
        )
    return tuple(stages)


def scoring_memory(
    architecture: Architecture,
    layout: ParallelLayout,
    operators: Operators,
    *,
    tokens: int,
    engine: int = 0,
) -> tuple[StageMemory, ...]:
    """Every stage, forward only. tokens: of the largest scoring micro-batch."""
    layer = layer_activations(architecture, layout, operators, tokens).forward
    hidden = _hidden(architecture, layout, operators, tokens)
    head = 2 * hidden + _head(architecture, layout, operators, tokens, forward_only=True)
    stages = []
    for stage, parameters in enumerate(stage_parameters(architecture, layout)):
        logprob = head if stage == layout.pp - 1 else 0
        stages.append(
            StageMemory(
                weights=weight_bytes(parameters, operators),
                logprob=logprob,
                layer=layer,
                engine=engine,
                reserve=_reserve(operators, max(layer, logprob)),
            )
        )
    return tuple(stages)


def worst(stages: Sequence[StageMemory]) -> int:
    """The stage with the highest peak."""
    return max(range(len(stages)), key=lambda stage: stages[stage].peak)


def _head(
    architecture: Architecture,
    layout: ParallelLayout,
    operators: Operators,
    tokens: int,
    *,
    forward_only: bool = False,
) -> int:
    own = -(-tokens // layout.cp)
    width = architecture.hidden_size
    space = workspace_bytes(
        own,
        width,
        architecture.padded_vocab(layout.tp) // layout.tp,
        torch.bfloat16 if operators.item == 2 else torch.float32,
        # Prompts have no targets; how short they are is not known.
        computed_tokens=max(own - 1, 1),
        # A GPU keeps what is free.
        keep_bytes=CPU_AUTO_KEEP_BYTES if operators.device == "cpu" and not forward_only else 0,
        device_type=operators.device,
    )
    group = 16 * layout.tp * own if layout.tp > 1 else 0
    gathered = width * operators.item * own if operators.sequence_parallel else 0
    if forward_only:
        return space.forward + group + gathered
    returned = operators.item * (own * width + _output_weight(architecture, layout))
    # Summed over the group in float32 before a rank takes its rows.
    summed = 4 * width * own if operators.sequence_parallel else 0
    norm = final_norm(architecture, layout, operators, tokens)
    return max(space.forward, space.backward) + space.kept + group + gathered + returned + summed + norm


def _output_weight(architecture: Architecture, layout: ParallelLayout) -> int:
    return architecture.padded_vocab(layout.tp) // layout.tp * architecture.hidden_size


def _hidden(architecture: Architecture, layout: ParallelLayout, operators: Operators, tokens: int) -> int:
    own = -(-tokens // layout.cp)
    outside = -(-own // layout.tp) if operators.sequence_parallel else own
    return architecture.hidden_size * operators.item * outside


def _reserve(operators: Operators, dynamic: int) -> int:
    return CUDA_RESERVE + int(FRAGMENTATION * dynamic) if operators.device == "cuda" else 0
