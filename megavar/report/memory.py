"""Memory that was planned against what fits took."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megavar.config.recipe import Fit, Recipe
from megavar.data.training_set import TRAINING_SET, TrainingSet
from megavar.plan.activations import Stack
from megavar.plan.plan import make_plan
from megavar.plan.request import request_of
from megavar.report.stored import StoredPhase, StoredRun

SAMPLED = 2000
"""Examples, evenly spaced, whose mean length is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    phase: str
    planned: float
    """Bytes of the heaviest pipeline stage: `megavar plan`'s peak of training, with this fit's micro-batches."""
    measured: float
    """Bytes: of the GPU allocator, or what the process took beyond what it held before."""


def memory_rows(run: StoredRun) -> list[MemoryRow]:
    """One row per finished fit that was measured.

    Raises UserError where the model's config.json is gone, or is of a model that cannot be planned.
    """
    rows = []
    planned: dict[tuple[int, int, str], float] = {}
    for phase in run.done("/fit"):
        measured, device = _measured(phase)
        work = _micro_batch(run, phase)
        if measured is None or work is None:
            continue
        if (key := (*work, device)) not in planned:
            planned[key] = _planned(run, *key)
        rows.append(MemoryRow(phase=phase.name, planned=planned[key], measured=measured))
    return rows


def _measured(phase: StoredPhase) -> tuple[float | None, str]:
    found = phase.metrics
    if (cuda := found.get("perf/peak_cuda_bytes")) is not None:
        return cuda, "cuda"
    if "perf/peak_rss_bytes" not in found:
        return None, ""
    return max(0.0, found["perf/peak_rss_bytes"] - found["perf/rss_before_bytes"]), "cpu"


def _planned(run: StoredRun, longest: int, tokens: int, device: str) -> float:
    stack: Stack = "transformer-engine" if device == "cuda" else "torch"
    request = request_of(run.recipe, gpu_gib=80.0, stack=stack, longest=longest)
    operators = replace(request.operators, device="cuda" if device == "cuda" else "cpu")
    request = replace(request, tokens_per_micro_batch=tokens, operators=operators)
    return float(max(stage.peak - stage.engine for stage in make_plan(request).training))


def _micro_batch(run: StoredRun, phase: StoredPhase) -> tuple[int, int] | None:
    """Tokens of the longest example and of a full micro-batch; None where the training set is gone.

    A step may have fewer tokens than the budget.
    """
    path = run.path / phase.name.removesuffix("/fit") / "data" / TRAINING_SET
    if not path.exists():
        path = run.path / "initial" / "data" / TRAINING_SET  # that of the arm `sft`
    try:
        examples = TrainingSet(path)
        count = examples.num_examples
        places = range(0, count, max(1, count // SAMPLED))
        mean = sum(len(examples[i].ids) for i in places) / max(len(places), 1)
        longest = examples.longest()
    except (OSError, ValueError):
        return None
    questions = _fit(run.recipe, phase.series).questions_per_step
    trainer = run.recipe.trainer
    step = math.ceil(mean * questions * count / max(examples.num_questions, 1) / trainer.layout.dp)
    return longest, max(longest, min(trainer.training_budget, step))


def _fit(recipe: Recipe, series: str) -> Fit:
    if series.startswith("posterior/own/"):
        return recipe.posterior.tune
    return {"initial/fit": recipe.initial, "posterior/fit": recipe.posterior.fit}.get(series, recipe.final)
