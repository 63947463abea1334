"""Log-probs of given tokens: the forward half of training, without gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from megavar.data.packing import plan_micro_batches
from megavar.data.training_set import Example
from megavar.trainer.batch import IGNORE, MicroBatch, padded_length
from megavar.trainer.model import Model, forward


@torch.no_grad()
def score(
    model: Model,
    examples: Sequence[Example],
    *,
    temperature: float,
    tokens_per_micro_batch: int,
    counted: Counter[str] | None = None,
) -> list[np.ndarray] | None:
    """log p of every response token of every example, float32 [response_length] each, at `temperature`.

    Called by all ranks of a data-parallel part with the same examples; different parts bring their own. With
    `model.lockstep` every rank of the job calls it, with no examples if need be. The answer is on the last pipeline
    stage, None elsewhere. An example of more than `tokens_per_micro_batch` tokens gets a micro-batch of its own.

    counted: summed over ranks, "scored" tokens and of these "replayed" ones, whose expert routes were recorded.
    """
    if not examples and not model.lockstep:
        return [] if model.groups.is_last_stage else None
    lengths = [padded_length(e, model.groups.cp) for e in examples]
    plan = plan_micro_batches(
        lengths,
        budget=tokens_per_micro_batch,
        ranks=1,
        packing=model.settings.packing,
        multiple_of=model.micro_batch_multiple,
    )[0]
    if model.lockstep:
        count = torch.tensor(len(plan), device=model.groups.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        plan += [[] for _ in range(int(count) - len(plan))]
    answers: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)

    def forward_step(work: Iterator[list[int]], chunk: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        indices = next(work)
        batch = model.micro_batch([examples[i] for i in indices])
        return forward(model, chunk, batch, temperature), partial(keep, batch, indices)

    def keep(batch: MicroBatch, indices: list[int], logprobs: torch.Tensor) -> tuple[torch.Tensor, dict]:
        if counted is not None and model.groups.tp_rank == 0:
            counted.update(scored=int((batch.targets != IGNORE).sum()), replayed=int(batch.replayed))
        whole = logprobs.float()
        if batch.rows is not None and batch.rows.split is not None:
            whole = batch.rows.split.gather(whole, mpu.get_context_parallel_group())
        values = whole.cpu().numpy()
        for i, response in zip(indices, batch.responses, strict=True):
            answers[i] = values[response].copy()
        return logprobs.sum(), {}

    for chunk in model.chunks:
        chunk.eval()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(plan) for _ in model.chunks],
        model=model.chunks,
        num_microbatches=len(plan),
        # Shapes travel with the activations (variable_seq_lengths); these are only upper bounds.
        seq_length=tokens_per_micro_batch,
        micro_batch_size=1,
        forward_only=True,
    )
    return answers if model.groups.is_last_stage else None
