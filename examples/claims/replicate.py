"""One seed's models, questions and traces: phases of a megavar run that claims share, each done once.

Everything is in a run directory, so a claim that is killed goes on where it was, and a second claim finds what the
first has made. The phases are the ones of `megavar run`, called in this process on one rank.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from settings import Settings
from task import prepare
from transformers import AutoTokenizer

from megavar.config.recipe import Arm, Fit, QuestionSource, Recipe
from megavar.data.questions import load_questions
from megavar.data.records import Question
from megavar.data.templates import Encoder, Template
from megavar.objectives.registry import needs_of
from megavar.phases.evaluation import evaluate
from megavar.phases.fitting import dataset_training_set, fit_phase
from megavar.phases.material import Material, training_set
from megavar.phases.run import Run
from megavar.phases.sampling import sample
from megavar.phases.scoring import verdict_store
from megavar.phases.steps import (
    answer_and_verify,
    judge,
    judge_own,
    policy_traces,
    posterior_traces,
    whole_samples,
)
from megavar.phases.tables import OwnSamples, Proposals
from megavar.phases.weighing import forward_kl_training_set
from megavar.progress import Progress
from megavar.runs import Phase, RunDirectory
from megavar.trainer.fit import Stretch, num_steps
from megavar.verifiers import is_correct


@dataclass(slots=True, kw_only=True)
class Replicate:
    """One seed of one claim; phases are computed on first use."""

    run: Run
    seed: int
    claim: dict[str, Any]
    taught: list[Question]
    others: list[Question]
    _kept: list[Any] = field(default_factory=list)
    """Question lists of variants, which `Run` knows by identity."""

    @classmethod
    @contextmanager
    def enter(cls, settings: Settings, seed: int, out: Path) -> Iterator[Replicate]:
        """Open the seed's run directory under `out`; the lock on it keeps other processes out."""
        directory = out / settings.shared / f"seed-{seed}"
        prepare(directory / "inputs", settings.task, seed)
        recipe = settings.recipe_of(seed, directory)
        # Another claim's recipe differs in its arms; phases that it leaves as they are stay valid.
        with RunDirectory.open(recipe, force=True):
            run = Run.enter(recipe.out)
            run.progress = Progress(enabled=False)
            inputs = directory / "inputs"
            rows = [
                load_questions(QuestionSource(kind="jsonl", path=inputs / f"{name}.jsonl"))
                for name in ("taught", "others")
            ]
            try:
                yield cls(run=run, seed=seed, claim=settings.claim, taught=rows[0], others=rows[1])
            finally:
                run.leave()

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    # Variants of the run

    def with_traces(self, count: int) -> Run:
        """K and M in place of the recipe's."""
        recipe = self.recipe
        update = {
            "rollout": recipe.rollout.model_copy(update={"traces": count}),
            "posterior": recipe.posterior.model_copy(update={"traces": count}),
        }
        return replace(self.run, recipe=recipe.model_copy(update=update))

    def with_questions(self, questions: Sequence[Question], run: Run | None = None) -> Run:
        """Other training questions."""
        own = list(questions)
        self._kept.append(own)
        return replace(run or self.run, train=own)

    def with_posterior_prompt(self, name: str, run: Run | None = None) -> Run:
        """A template of the recipe's as the posterior's; the policy's own name gives prompts without a hint."""
        if name == self.recipe.templates.policy:
            return replace(run or self.run, posterior=self.run.policy)
        spec = self.recipe.templates.custom[name]
        tokenizer = AutoTokenizer.from_pretrained(self.recipe.model.path, local_files_only=True)
        encoder = Encoder(Template(name=name, **spec.model_dump()), tokenizer)
        return replace(run or self.run, posterior=encoder)

    # Phases that claims share

    def initial(self) -> Phase:
        """pi_0, which learnt the teacher's traces and answers."""
        data = dataset_training_set(
            self.run, "initial/data", encoder=self.run.policy, questions=self.taught, with_answer=True
        )
        return fit_phase(self.run, "initial/fit", start=None, data=data, fit=self.recipe.initial)

    def taught_posterior(self) -> Phase:
        """q fitted to the teacher's traces, as the paper's authors did."""
        name = "posterior-taught"
        data = dataset_training_set(
            self.run, f"{name}/data", encoder=self.run.posterior, questions=self.taught, with_answer=False
        )
        return fit_phase(self.run, f"{name}/fit", start=None, data=data, fit=self.recipe.posterior.fit)

    def posterior(
        self, name: str = "posterior", run: Run | None = None, *, start: Phase | None = None
    ) -> Phase:
        """q by forward KL to the true posterior (Eq. 9), on M of pi_0's traces per question.

        start: what it goes on from; random weights by default.
        """
        run = run or self.run
        initial = self.initial()
        traces = sample(run, policy_traces(run, f"{name}/traces", initial))
        answers, verdicts = answer_and_verify(run, name, initial, traces)
        data = forward_kl_training_set(run, f"{name}/data", traces=traces, answers=answers, verdicts=verdicts)
        return fit_phase(run, f"{name}/fit", start=start, data=data, fit=self.recipe.posterior.fit)

    def proposals(
        self,
        name: str = "proposals",
        *,
        posterior: Phase | None = None,
        run: Run | None = None,
        answers: bool = True,
    ) -> Proposals:
        """K traces of a posterior with their scores and, where they are asked for, N answers."""
        run, q = run or self.run, posterior or self.posterior()
        traces = sample(run, posterior_traces(run, f"{name}/traces", q))
        return judge(run, name, traces, policy=self.initial(), posterior=q, answers=answers)

    def own(self, count: int, arms: Sequence[Arm]) -> OwnSamples:
        """`count` whole samples of pi_0 per question."""
        run, name, initial = self.with_traces(count), f"own-{count}", self.initial()
        traces = sample(run, whole_samples(run, f"{name}/traces", initial))
        return judge_own(run, name, traces, needs_of(arms), policy=initial, initial=initial)

    # Arms

    def train(
        self,
        name: str,
        data: Phase,
        *,
        fit: Fit | None = None,
        start: Phase | None = None,
        stretch: Stretch | None = None,
    ) -> Phase:
        """A policy from pi_0, or from `start`, after the recipe's final fit."""
        fit = fit or self.fit()
        return fit_phase(
            self.run, f"{name}/fit", start=start or self.initial(), data=data, fit=fit, stretch=stretch
        )

    def fit(self, rounds: int = 1) -> Fit:
        """As many steps for every arm, whatever questions have a weight; an equal share of them for each round."""
        final = self.recipe.final
        return final.model_copy(update={"steps": num_steps(final, len(self.run.train)) // rounds})

    def arm(self, arm: Arm, material: Material, *, sampled: int, run: Run | None = None) -> dict[str, Any]:
        """Weigh, train and evaluate one arm. sampled: tokens that its traces and answers took."""
        name = self.arm_name(arm, material)
        data = training_set(run or self.run, f"{name}/data", arm, material)
        return self.outcome(name, self.train(name, data), data=data, sampled=sampled)

    def arm_name(self, arm: Arm, material: Material) -> str:
        """The same for the same arm in another claim, so that it is trained once."""
        used = [p.hash for part in (material.proposals, material.own) if part for p in part.phases]
        parts = [arm.model_dump(mode="json", exclude={"name"}), self.fit().model_dump(mode="json"), used]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        return f"arms/{arm.name}-{digest}"

    def outcome(
        self, name: str, weights: Phase, *, data: Phase | None, sampled: int, steps: int | None = None
    ) -> dict[str, Any]:
        """Held-out accuracy, over all and by letter, and what it cost."""
        found: dict[str, Any] = self.accuracy(name, weights)
        made = (data.manifest or {}) if data else {}
        kept = ("vr/ess", "vr/largest_weight", f"vr/bound_{self.recipe.rollout.traces}", "vr/bound_1")
        found["metrics"] = {k: made["metrics"][k] for k in kept if k in made.get("metrics", {})}
        found["steps"] = steps if steps is not None else self.fit().steps
        found["sampled_tokens"] = sampled
        return found

    def accuracy(self, name: str, weights: Phase) -> dict[str, Any]:
        """Share of right samples on the held-out questions: {"accuracy": ..., "by": {letter: ...}}."""
        verdicts = evaluate(self.run, f"{name}/eval", weights=weights)
        scores: dict[str, list[float]] = defaultdict(list)
        for (question, _, _), row in verdict_store(verdicts).read_keyed(["score"]).items():
            scores[question[0]].append(float(is_correct(row["score"])))
        every = [score for group in scores.values() for score in group]
        by = {letter: sum(group) / len(group) for letter, group in sorted(scores.items())}
        return {"accuracy": sum(every) / len(every), "by": by}


def sampled_tokens(*phases: Phase | None) -> int:
    """Tokens that the engine sampled in these phases."""
    return sum(_tokens(phase.manifest or {}) for phase in phases if phase)


def posterior_tokens(run: Run, name: str = "posterior") -> int:
    """Tokens that `Replicate.posterior` of that name had sampled for its fit."""
    folders = (run.directory.path / name / kind for kind in ("traces", "answers"))
    return sum(_tokens(json.loads((folder / "manifest.json").read_text())) for folder in folders)


def _tokens(manifest: Mapping[str, Any]) -> int:
    return sum(manifest["counts"].get(name, 0) for name in ("thought_ids", "answer_ids", "ids"))


def round_of(fit: Fit, number: int, rounds: int) -> Stretch:
    """The steps of one round, from 0, where each of them takes those of `fit`, under one schedule."""
    steps = fit.steps or 0
    return Stretch(first=number * steps, last=(number + 1) * steps, steps=rounds * steps)


def single_threaded() -> None:
    """Models this small gain nothing from a second thread; two seeds at once do."""
    torch.set_num_threads(1)
