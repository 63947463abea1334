"""What every phase of a run shares: the recipe, this rank's place, questions, prompts, metrics."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megavar.config.recipe import Recipe
from megavar.data.questions import load_questions
from megavar.data.records import Question, Trace
from megavar.data.routes import Routes
from megavar.data.templates import Encoder, resolve_templates
from megavar.errors import UserError
from megavar.metrics import Metrics
from megavar.models.architecture import read_architecture
from megavar.models.stack import describe_stack
from megavar.parallel.groups import Groups, initialize
from megavar.phases.engines import role_engines
from megavar.phases.identity import digest_model, digest_questions
from megavar.progress import Progress
from megavar.rollout.engine import SamplingParams
from megavar.rollout.roles import RoleEngines, SampledRole
from megavar.runs import Phase, RunDirectory
from megavar.sync.transport import WeightSync
from megavar.tracking.chosen import open_trackers
from megavar.trainer.model import Model, Settings, load_model
from megavar.verifiers import WorkerPool


class StopRun(Exception):
    """The phase that the user wanted to stop after is finished."""


@dataclass(slots=True, kw_only=True)
class Run:
    """One rank's view of the run."""

    directory: RunDirectory
    recipe: Recipe
    groups: Groups
    settings: Settings
    metrics: Metrics
    progress: Progress
    train: list[Question]
    held_out: list[Question]
    policy: Encoder
    posterior: Encoder
    verifiers: WorkerPool
    until: str | None
    base: str
    """Names the bytes of the base model."""
    stack: str
    """What computes the model here, in words."""
    engines: RoleEngines
    """Started on first use; only samplers have any."""
    syncs: dict[SampledRole, WeightSync] = field(default_factory=dict)
    """Ways for weights from the ranks to the engines, where the recipe asks for another one than files."""
    finished: set[str] = field(default_factory=set)
    """Phases passed so far."""
    _digests: dict[int, str] = field(default_factory=dict)
    _model: tuple[str, Model] | None = None

    @classmethod
    def enter(cls, path: Path, *, until: str | None = None) -> Run:
        """Join the ranks of the run in `path`, whose recipe has passed `megavar.preflight`."""
        writer = int(os.environ.get("RANK", "0")) == 0
        directory = RunDirectory.attach(path, writer=writer)
        recipe = directory.recipe
        trainer = recipe.trainer
        groups = initialize(trainer.layout, seed=trainer.seed)
        tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, local_files_only=True)
        policy, posterior = (Encoder(t, tokenizer) for t in resolve_templates(recipe.templates))
        base = [digest_model(recipe.model.path, path / ".model.json") if writer else ""]
        dist.broadcast_object_list(base)
        mixture = read_architecture(recipe.model.path).is_moe
        stack = describe_stack(groups.device, mixture=mixture, switches=trainer.megatron)
        if groups.is_main:
            print(f"stack: {stack}", file=sys.stderr)
        return cls(
            directory=directory,
            recipe=recipe,
            groups=groups,
            settings=Settings(
                dtype=recipe.model.dtype,
                sequence_parallel=trainer.sequence_parallel,
                packing=trainer.packing,
                recompute=trainer.recompute,
                expert_balance=trainer.expert_balance,
                switches=trainer.megatron,
            ),
            metrics=Metrics(
                path / "metrics.jsonl",
                writer=groups.is_main,
                trackers=open_trackers(recipe, path) if groups.is_main else (),
            ),
            progress=Progress(enabled=groups.is_main),
            train=load_questions(recipe.data.train),
            held_out=load_questions(recipe.data.eval),
            policy=policy,
            posterior=posterior,
            verifiers=WorkerPool(trainer.threads),
            until=until,
            base=base[0],
            stack=stack,
            engines=role_engines(recipe, groups.device, path / ".engine-logs"),
        )

    def sampling(self, max_tokens: int, *, replayed: bool = False) -> SamplingParams:
        """The recipe's sampling of traces and answers, at most `max_tokens` each.

        replayed: the model that samples will score or learn them too, where the recipe says so by the same experts.
        """
        rollout = self.recipe.rollout
        return SamplingParams(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=max_tokens,
            context_length=rollout.context_length,
            return_experts=replayed and rollout.replay_experts,
        )

    def routes(self, trace: Trace, prompt: np.ndarray, kept: int) -> Routes | None:
        """`Trace.routes`, for a final fit; None where that starts from other weights than those that sampled."""
        return trace.routes(prompt, kept) if self.recipe.warm_start == "initial" else None

    def leave(self) -> None:
        """Close files and process groups; every rank calls it at the end."""
        for sync in self.syncs.values():
            sync.close()
        self.engines.close()
        self.verifiers.close()
        self.metrics.close()
        self.directory.close()
        dist.barrier()
        dist.destroy_process_group()

    @property
    def samplers(self) -> int:
        """How many ranks, from the first on, drive an engine: all of them in process, one in front of servers."""
        return self.groups.world if self.recipe.rollout.engine == "local" else 1

    def model(self, weights: Phase) -> Model:
        """The model that a fit made, for reading."""
        if self._model is not None and self._model[0] == weights.name:
            return self._model[1]
        self._model = None  # before the next one takes memory
        model = load_model(weights.path / "hf", self.groups, self.settings)
        self.keep_model(weights, model)
        return model

    def keep_model(self, weights: Phase, model: Model) -> None:
        """`model` is what the fit in `weights` made. It stays for the next push of weights, and for that alone: while
        an engine samples, its memory may be needed."""
        if any(fleet.transport != "disk" for fleet in self.recipe.rollout.fleets):
            for chunk in model.chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad = None  # a view of the training's gradient buffer
            self._model = (weights.name, model)

    def release_model(self) -> None:
        """Make room for a fit."""
        self._model = None

    def parts(self, questions: Sequence[Question]) -> list[Sequence[Question]]:
        """The questions in the units that stores are written and resumed in."""
        size = self.recipe.rollout.questions_per_part
        return [questions[i : i + size] for i in range(0, len(questions), size)]

    def digest(self, questions: Sequence[Question]) -> str:
        """Names what the questions say. `questions`: `train` or `held_out`, which are read once."""
        if id(questions) not in self._digests:
            self._digests[id(questions)] = digest_questions(questions)
        return self._digests[id(questions)]

    @contextmanager
    def phase(
        self, name: str, *, config: Mapping[str, Any], inputs: Sequence[Phase] = ()
    ) -> Iterator[OpenPhase]:
        """Open a phase; the block does the work unless `todo` is false, and sets `counts` and `metrics`.

        Raises StopRun where the phase named by `until` is behind us.
        """
        if self.until in self.finished:
            raise StopRun
        phase = self.directory.phase(name, config=config, inputs=inputs)
        # Every rank looks before any begins to work: a file that one restores must not look finished to another.
        opened = OpenPhase(phase=phase, todo=not phase.done)
        dist.barrier()
        if not opened.todo:
            manifest = phase.manifest or {}
            self.progress.already(name, manifest["seconds"])
            self.metrics.passed(name, manifest["metrics"])
        try:
            yield opened
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if opened.todo:
            dist.barrier()
            # JSON has neither infinities nor NaN; `float` reads their names.
            infinite = {k for k, v in opened.metrics.items() if isinstance(v, float) and not math.isfinite(v)}
            metrics = {k: str(v) if k in infinite else v for k, v in opened.metrics.items()}
            phase.finish(opened.counts, metrics, opened.warnings)
            if not opened.stepwise:
                self.metrics.rewind(name)
            self.metrics.log(name, 0, metrics)
        # The next phase reads this one's manifest.
        dist.barrier()
        self.finished.add(name)

    def open_early(
        self, name: str, *, config: Mapping[str, Any], inputs: Sequence[Phase] = ()
    ) -> Phase | None:
        """The directory of a phase before its turn, for parts of it; None where it is finished. Not collective."""
        phase = self.directory.phase(name, config=config, inputs=inputs)
        return None if phase.done else phase


@dataclass(slots=True, kw_only=True)
class OpenPhase:
    phase: Phase
    todo: bool
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What the user was told of the phase, for the report."""
    stepwise: bool = False
    """The block logs metrics itself too, from step 1 on; `metrics` are logged at the end as step 0."""

    @property
    def path(self) -> Path:
        return self.phase.path


def sampling_seeds(seed: int, purpose: str, key: str, count: int) -> tuple[int, ...]:
    """`count` distinct 31-bit seeds that depend on their arguments alone."""
    digest = hashlib.blake2b(f"{seed}:{purpose}:{key}".encode(), digest_size=8).digest()
    first = int.from_bytes(digest, "little")
    return tuple((first + k) % 2**31 for k in range(count))


def total_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Sum of each value over all ranks."""
    names = sorted(values)
    sums = torch.tensor(
        [float(values[n]) for n in names], dtype=torch.float64, device=torch.cuda.current_device()
    )
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def largest_over_ranks(value: float) -> float:
    """The largest of all ranks' values."""
    largest = torch.tensor([value], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
