"""Training phases: a training set in, a Hugging Face directory out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megavar.config.recipe import Fit, Trainer
from megavar.data.packing import padded_tokens
from megavar.data.records import Question
from megavar.data.templates import Encoder
from megavar.data.training_set import TRAINING_SET, Example, TrainingSet, write_training_set
from megavar.errors import UserError
from megavar.models.hf_export import export_hf, verify_export
from megavar.phases.peak import PhaseMemory
from megavar.phases.run import OpenPhase, Run
from megavar.runs import Phase
from megavar.trainer import checkpoint
from megavar.trainer.fit import Stretch, fit_model, num_steps
from megavar.trainer.model import load_model

_STATE = ".state"


def dataset_training_set(
    run: Run, name: str, *, encoder: Encoder, questions: Sequence[Question], with_answer: bool
) -> Phase:
    """The data set's own traces with weight one: thought, and for the policy the reference solution behind it."""
    config = {
        "template": dataclasses.asdict(encoder.template),
        "with_answer": with_answer,
        "questions": run.digest(questions),
        "model": run.base,
    }
    examples = (dataset_example(encoder, q, with_answer=with_answer) for q in questions)
    return write_training_phase(run, name, config=config, inputs=[], build=lambda _: examples)


def dataset_example(
    encoder: Encoder, question: Question, *, with_answer: bool, weight: float = 1.0
) -> Example:
    """The question's own trace as an example."""
    response = encoder.thought_ids(question.trace or "")
    if with_answer:
        response = np.concatenate([response, encoder.answer_ids(question.solution)])
    return Example.of(question.id, encoder.prompt_ids(question), response, weight)


def write_training_phase(
    run: Run,
    name: str,
    *,
    config: dict[str, Any],
    inputs: Sequence[Phase],
    build: Callable[[OpenPhase], Iterable[Example]],
) -> Phase:
    """A phase that holds a training set; `build` yields its examples and may add to the metrics of the phase."""
    with run.phase(name, config=config, inputs=inputs) as opened:
        if opened.todo and opened.phase.writer:
            with run.progress.phase(name, None, "examples") as task:
                count = write_training_set(opened.path / TRAINING_SET, build(opened))
                training_set = TrainingSet(opened.path / TRAINING_SET)
                task.advance(count)
            opened.counts = {"examples": count, "questions": training_set.num_questions}
            opened.metrics["train/normaliser"] = training_set.normaliser
    return opened.phase


def fit_phase(
    run: Run, name: str, *, start: Phase | None, data: Phase, fit: Fit, stretch: Stretch | None = None
) -> Phase:
    """Train on the data from `start` (None: the recipe's base model) and export to `<phase>/hf`.

    A stretch that is not the first goes on with the optimizer state that `start` left beside its weights. It rests
    there on disk, where resumption needs it anyway, and takes no memory while the other model is trained.
    """
    trainer = run.recipe.trainer
    before = start.path / _STATE if start and stretch and stretch.first else None
    config = {
        "fit": fit.model_dump(mode="json"),
        "seed": trainer.seed,
        "dtype": run.settings.dtype,
        "model": run.base,
        **({"expert_balance": trainer.expert_balance} if trainer.expert_balance else {}),
        **({"megatron": trainer.megatron} if trainer.megatron else {}),
        **({"stretch": dataclasses.asdict(stretch)} if stretch else {}),
    }
    with run.phase(name, config=config, inputs=[data, *([start] if start else [])]) as opened:
        checkpoints, opened.stepwise = opened.path / ".checkpoints", True
        if opened.todo:
            if before and checkpoint.latest_step(before) is None:
                raise UserError(f"{before} is gone; remove {before.parent} to train it again")
            training_set = TrainingSet(data.path / TRAINING_SET)
            _check_budget(trainer, training_set)
            run.release_model()
            peak = PhaseMemory(run.groups.device)
            model = load_model(
                start.path / "hf" if start else run.recipe.model.path, run.groups, run.settings
            )
            resumed = checkpoint.latest_step(checkpoints) or 0
            run.metrics.rewind(name, resumed if resumed else -1)
            steps = num_steps(fit, training_set.num_questions)
            first, last = (stretch.first, stretch.last) if stretch else (0, steps)
            with run.progress.phase(name, last - first, "steps", done=max(0, resumed - first)) as task:

                def report(step: int, steps: int, metrics: dict[str, float]) -> None:
                    run.metrics.log(name, step, metrics)
                    task.advance(loss=metrics["train/loss"])

                result = fit_model(
                    model,
                    training_set,
                    fit,
                    tokens_per_micro_batch=trainer.training_budget,
                    seed=trainer.seed,
                    checkpoints=checkpoints,
                    report=report,
                    data=opened.phase.inputs[data.name],
                    stretch=stretch,
                    before=before,
                    after=opened.path / _STATE if stretch and stretch.last < stretch.steps else None,
                )
            export_hf(
                model.chunks, model.architecture, run.recipe.model.path, opened.path / "hf", overwrite=True
            )
            if run.groups.is_main:
                verify_export(opened.path / "hf")
            opened.counts = {"steps": result.steps}
            opened.metrics = {"train/final_loss": result.loss, "perf/stack": run.stack, **peak.metrics()}
            run.keep_model(opened.phase, model)
    # Only now: killed before the manifest is there, the phase goes on from its newest checkpoint.
    if opened.phase.writer:
        checkpoint.remove(checkpoints)
        if before:
            checkpoint.remove(before)
    return opened.phase


def _check_budget(trainer: Trainer, training_set: TrainingSet) -> None:
    """Of a budget that the recipe names; where it leaves it out, longer examples have micro-batches of their own."""
    budget, longest = trainer.tokens_per_micro_batch, training_set.longest()
    if budget is not None and trainer.packing and budget < (least := padded_tokens(longest, trainer.cp)):
        raise UserError(
            f"trainer.tokens_per_micro_batch is {budget}: the longest example has {longest} tokens; set it to at least "
            f"{least}, or leave it out"
        )
