"""Log-probs of given tokens: the forward half of training, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megavar.data.packing import plan_micro_batches
from megavar.data.training_set import Example
from megavar.trainer.batch import MicroBatch, build_micro_batch
from megavar.trainer.model import Model, forward


@torch.no_grad()
def score(
    model: Model, examples: Sequence[Example], *, temperature: float, tokens_per_micro_batch: int
) -> list[np.ndarray] | None:
    """log p of every response token of every example, float32 [response_length] each, at `temperature`.

    Called by all ranks of a tensor- and pipeline-parallel group with the same examples; different data-parallel ranks
    bring their own. The answer is on the last pipeline stage, None elsewhere.
    """
    if not examples:
        return [] if model.groups.is_last_stage else None
    budget = max(tokens_per_micro_batch, max(len(e.ids) for e in examples))
    lengths = [len(e.ids) for e in examples]
    plan = plan_micro_batches(lengths, budget=budget, ranks=1, packing=model.settings.packing)[0]
    plan = [indices for indices in plan if indices]
    answers: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)
    work = iter(plan)

    def forward_step(_: object, module: torch.nn.Module) -> tuple[torch.Tensor, partial]:
        indices = next(work)
        batch = build_micro_batch(
            [examples[i] for i in indices],
            model.groups.device,
            multiple_of=model.length_multiple,
            packing=model.settings.packing,
        )
        return forward(model, module, batch, temperature), partial(keep, batch, indices)

    def keep(batch: MicroBatch, indices: list[int], logprobs: torch.Tensor) -> tuple[torch.Tensor, dict]:
        values = logprobs.float().cpu().numpy()
        for i, response in zip(indices, batch.responses, strict=True):
            answers[i] = values[response].copy()
        return logprobs.sum(), {}

    model.module.eval()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model.module],
        num_microbatches=len(plan),
        # Shapes travel with the activations (variable_seq_lengths); these are only upper bounds.
        seq_length=budget,
        micro_batch_size=1,
        forward_only=True,
    )
    return answers if model.groups.is_last_stage else None
