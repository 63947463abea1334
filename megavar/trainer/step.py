"""One optimizer step: the weighted log-likelihood of a global batch, the same under every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megavar.data.packing import plan_micro_batches
from megavar.data.training_set import Example
from megavar.models.flops import forward_flops
from megavar.trainer.batch import IGNORE, MicroBatch, padded_length
from megavar.trainer.model import Model, forward
from megavar.trainer.optimizer import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    loss: float
    """-(1/(|B| C)) * sum of weight * log p over the global batch."""
    mean_nll: float
    """Unweighted mean -log p of the response tokens, nats."""
    response_tokens: int
    replayed_tokens: int
    """Of these, predicted after a token that went to the experts that its sampling recorded."""
    tokens: int
    micro_batches: int
    """Per data-parallel rank."""


def backward_global_batch(
    model: Model,
    training: Training,
    examples: Sequence[Example],
    *,
    questions: int,
    normaliser: float,
    tokens_per_micro_batch: int,
) -> StepMetrics:
    """Gradients of L = -(1/|B|) sum_x sum_k w_k (1/C) sum_t log pi(t) (Appendix C) into the gradient buffers.

    examples: the global batch, the same list on every rank; each data-parallel rank computes its part of a common plan.
    questions: |B|; normaliser: C in tokens. Both are constants of the batch, so that neither packing nor a
    rank's own number of tokens moves the loss.
    """
    groups = model.groups
    lengths = [padded_length(e, groups.cp) for e in examples]
    plan = plan_micro_batches(
        lengths,
        budget=tokens_per_micro_batch,
        ranks=groups.dp,
        packing=model.settings.packing,
        cost=partial(forward_flops, model.architecture),
        multiple_of=model.micro_batch_multiple,
    )[groups.dp_rank]
    sums = torch.zeros(5, dtype=torch.float64, device=groups.device)
    # Megatron averages over micro-batches and over data-parallel ranks; the loss is a sum over both.
    undo_means = len(plan) * groups.dp

    def forward_step(
        work: Iterator[list[int]], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, partial[tuple[torch.Tensor, dict]]]:
        batch = model.micro_batch([examples[i] for i in next(work)])
        return forward(model, chunk, batch, temperature=1.0), partial(loss, batch)

    def loss(batch: MicroBatch, logprobs: torch.Tensor) -> tuple[torch.Tensor, dict]:
        value = -(batch.weights * logprobs).sum() / (normaliser * questions)
        if groups.tp_rank == 0:
            # Ignored tokens have log-prob 0.
            counts = ((batch.targets != IGNORE).sum(), batch.replayed, batch.tokens.numel())
            seen = (value, -logprobs.double().sum(), *counts)
            sums.add_(torch.stack([torch.as_tensor(x, device=sums.device).detach().double() for x in seen]))
        # The schedule scales what it is given in place, hence a tensor of its own.
        return value * undo_means, {}

    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(plan) for _ in training.chunks],
        model=training.chunks,
        num_microbatches=len(plan),
        # Shapes travel with the activations (variable_seq_lengths); these are only upper bounds.
        seq_length=tokens_per_micro_batch,
        micro_batch_size=1,
        forward_only=False,
    )
    # Of the last stages, tensor-parallel rank 0 has counted the tokens of its context part.
    dist.all_reduce(sums)
    total, nll, targets, replayed, tokens = sums.tolist()
    return StepMetrics(
        loss=total,
        mean_nll=nll / max(targets, 1),
        response_tokens=int(targets),
        replayed_tokens=int(replayed),
        tokens=int(tokens),
        micro_batches=len(plan),
    )
