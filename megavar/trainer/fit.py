"""The loop of one training phase: the same data order and the same result whether or not it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megavar.config.recipe import Fit
from megavar.data.training_set import Example, TrainingSet
from megavar.errors import UserError
from megavar.trainer import checkpoint
from megavar.trainer.model import Model
from megavar.trainer.optimizer import prepare_training, release_training
from megavar.trainer.step import backward_global_batch

Report = Callable[[int, int, dict[str, float]], None]
"""Called on every rank after each step with (step, steps, metrics)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    steps: int
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
) -> FitResult:
    """Train `model` in place on the weighted log-likelihood of `training_set`; collective.

    Resumes from the newest checkpoint under `checkpoints`.

    Raises:
        UserError: an empty training set, an example longer than the model's context or the token budget, a loss
            that is not finite (the newest checkpoint is kept).
    """
    _check(model, training_set, tokens_per_micro_batch)
    steps = num_steps(fit, training_set.num_questions)
    training = prepare_training(model, fit, steps)
    first = checkpoint.load_latest(model, training, checkpoints)
    loss = math.nan
    for step in range(first, steps):
        started = time.perf_counter()
        metrics = backward_global_batch(
            model,
            training,
            list(global_batch(training_set, step, fit.questions_per_step, seed)),
            questions=fit.questions_per_step,
            normaliser=training_set.normaliser,
            tokens_per_micro_batch=tokens_per_micro_batch,
        )
        loss = metrics.loss
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step + 1} of {steps}; finished phases and the checkpoint of step "
                f"{checkpoint.latest_step(checkpoints) or 0} are kept. Lower `lr` or raise `warmup` and run again"
            )
        training.schedule.step(increment=1)
        _, grad_norm, _ = training.optimizer.step()
        seconds = time.perf_counter() - started
        report(
            step + 1,
            steps,
            {
                "train/loss": loss,
                "train/mean_nll": metrics.mean_nll,
                "train/grad_norm": float(grad_norm or 0.0),
                "train/lr": training.optimizer.param_groups[0]["lr"],
                "train/response_tokens": metrics.response_tokens,
                "perf/step_seconds": seconds,
                "perf/tokens_per_second": metrics.tokens / seconds,
            },
        )
        if fit.checkpoint_every and (step + 1) % fit.checkpoint_every == 0 and step + 1 < steps:
            checkpoint.save(model, training, checkpoints, step + 1)
    release_training(model)
    return FitResult(steps=steps, loss=loss, resumed_at=first)


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


def _check(model: Model, training_set: TrainingSet, tokens_per_micro_batch: int) -> None:
    if training_set.num_questions == 0:
        raise UserError("the training set is empty: no question has an example with a weight")
    longest = training_set.longest()
    if longest > model.architecture.max_positions:
        raise UserError(
            f"an example has {longest} tokens, the model's context is {model.architecture.max_positions}; "
            "lower rollout.max_thought_tokens or leave the longest questions out"
        )
    if longest > tokens_per_micro_batch:
        raise UserError(
            f"an example has {longest} tokens; raise trainer.tokens_per_micro_batch to at least that "
            f"(now {tokens_per_micro_batch})"
        )
