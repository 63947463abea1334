"""The loop of one training phase: the same data order and the same result whether or not it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megavar import preemption
from megavar.config.diff import NEUTRAL_LEAVES
from megavar.config.recipe import Fit
from megavar.data.training_set import Example, TrainingSet
from megavar.errors import UserError
from megavar.trainer.checkpoint import Checkpoints
from megavar.trainer.model import Model
from megavar.trainer.optimizer import prepare_training, release_training
from megavar.trainer.step import backward_global_batch

Report = Callable[[int, int, dict[str, float]], None]
"""Called on every rank after each step with (step, steps, metrics)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Steps [first, last) of a fit of `steps` that goes on over several training sets, a phase for each."""

    first: int
    last: int
    steps: int
    """The learning-rate schedule spans them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    steps: int
    """Of this fit, or of the stretch."""
    loss: float
    """Of the last step."""
    resumed_at: int
    """First step that this call computed, 0-based."""


def fit_model(
    model: Model,
    training_set: TrainingSet,
    fit: Fit,
    *,
    tokens_per_micro_batch: int,
    seed: int,
    checkpoints: Path,
    report: Report,
    data: str = "",
    stretch: Stretch | None = None,
    before: Path | None = None,
    after: Path | None = None,
) -> FitResult:
    """Train `model` in place on the weighted log-likelihood of `training_set`; collective.

    Resumes from the newest checkpoint under `checkpoints`, whatever layout wrote it. All that varies from step to step
    (the batch, the learning rate, random streams) is a function of the seed and the step.

    tokens_per_micro_batch: a longer example gets a micro-batch of its own. data: names the training set's contents,
    to refuse a checkpoint of another. stretch: the steps to take, all by default; it goes on from the optimizer state
    that the stretch before it left in `before`, and leaves its own in `after`.

    Raises:
        UserError: an empty training set, an example longer than the model's context, a checkpoint that is damaged or
            of another fit, a loss that is not finite (the newest checkpoint is kept).
        Preempted: a rank was asked to stop; a checkpoint is written.
    """
    _check(model, training_set)
    steps = stretch.steps if stretch else num_steps(fit, training_set.num_questions)
    last = stretch.last if stretch else steps
    training = prepare_training(model, fit, steps)
    identity = {
        "model": asdict(model.architecture),
        "dtype": model.settings.dtype,
        "fit": fit.model_dump(mode="json", exclude=set(NEUTRAL_LEAVES)),
        "steps": steps,
        "seed": seed,
    }
    stored = Checkpoints(checkpoints, {**identity, "training_set": data}, keep=fit.checkpoint_keep)
    resumed = stored.resume(model, training)
    if resumed.step == 0 and before is not None:
        resumed = Checkpoints(before, identity, keep=1).resume(model, training)
    loss = resumed.loss
    with preemption.deferred():
        for step in range(resumed.step, last):
            started = time.perf_counter()
            _seed_streams(model, seed, step)
            batch = list(global_batch(training_set, step, fit.questions_per_step, seed))
            metrics = backward_global_batch(
                model,
                training,
                batch,
                questions=fit.questions_per_step,
                normaliser=training_set.normaliser,
                tokens_per_micro_batch=tokens_per_micro_batch,
            )
            loss = metrics.loss
            if not math.isfinite(loss):
                stored.finish()
                raise UserError(
                    f"the loss is {loss} at step {step + 1} of {steps}; finished phases and the newest checkpoint "
                    "are kept. Lower `lr` or raise `warmup` and run again"
                )
            training.schedule.step(increment=1)
            _, grad_norm, _ = training.optimizer.step()
            seconds = time.perf_counter() - started
            replayed = metrics.replayed_tokens / max(metrics.response_tokens, 1)
            recorded = any(example.experts is not None for example in batch)
            report(
                step + 1,
                steps,
                {
                    "train/loss": loss,
                    "train/mean_nll": metrics.mean_nll,
                    "train/grad_norm": float(grad_norm or 0.0),
                    "train/lr": training.optimizer.param_groups[0]["lr"],
                    "train/response_tokens": metrics.response_tokens,
                    **({"train/replayed_share": replayed} if recorded else {}),
                    "perf/step_seconds": seconds,
                    "perf/tokens_per_second": metrics.tokens / seconds,
                },
            )
            stop, writing = _any_rank(preemption.requested(), not stored.written)
            if not writing:
                stored.finish()
            if stop:
                stored.save(model, training, step=step + 1, loss=loss)
                stored.finish()
                raise preemption.Preempted(f"after step {step + 1} of {steps}")
            if fit.checkpoint_every and (step + 1) % fit.checkpoint_every == 0 and step + 1 < last:
                stored.save(model, training, step=step + 1, loss=loss)
        stored.finish()
        if after is not None:
            left = Checkpoints(after, identity, keep=1)
            left.save(model, training, step=last, loss=loss)
            left.finish()
    release_training(model, training)
    return FitResult(steps=last - (stretch.first if stretch else 0), loss=loss, resumed_at=resumed.step)


def num_steps(fit: Fit, questions: int) -> int:
    """`fit.steps`, or as many as `fit.epochs` passes over the questions take."""
    return fit.steps or max(1, math.ceil(fit.epochs * questions / fit.questions_per_step))


def global_batch(
    training_set: TrainingSet, step: int, questions_per_step: int, seed: int
) -> Iterator[Example]:
    """All examples of the questions of this step: consecutive slices of an endless row of shuffled epochs.

    A function of (step, seed) alone, so the step number is the whole data cursor.
    """
    count = training_set.num_questions
    for place in range(step * questions_per_step, (step + 1) * questions_per_step):
        epoch, offset = divmod(place, count)
        for index in training_set.examples_of(int(_epoch_order(count, seed, epoch)[offset])):
            yield training_set[index]


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _seed_streams(model: Model, seed: int, step: int) -> None:
    """Random streams of this step. Nothing draws from them as long as there is no dropout."""
    drawn = np.random.SeedSequence((seed, step, model.groups.pp_rank)).generate_state(1)[0]
    model_parallel_cuda_manual_seed(int(drawn) % 2**31)


def _any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set on any rank; on host memory, so that no GPU is waited for."""
    seen = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in seen.tolist()]


def _check(model: Model, training_set: TrainingSet) -> None:
    if training_set.num_questions == 0:
        raise UserError("the training set is empty: no question has an example with a weight")
    longest = training_set.longest()
    if longest > model.architecture.max_positions:
        raise UserError(
            f"an example has {longest} tokens, the model's context is {model.architecture.max_positions}; "
            "lower rollout.max_thought_tokens or leave the longest questions out"
        )
