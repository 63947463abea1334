"""`megavar eval MODEL_DIR --data SPEC|RECIPE.toml`: accuracy on questions; `--suite` is in `eval_suite`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from megavar.commands import eval_suite
from megavar.commands.eval_engine import engine
from megavar.commands.tables import TableWriter, check_output
from megavar.config.load import load_recipe
from megavar.config.recipe import Evaluate, QuestionSource, Recipe, Rollout, Templates
from megavar.data.records import Question
from megavar.data.suggest import did_you_mean
from megavar.errors import UserError
from megavar.evaluate.samples import RECORDS, sample_row, verify_rows, vote
from megavar.evaluate.statistics import accuracy, majority_vote, pass_at_k
from megavar.models.architecture import read_architecture
from megavar.models.hf_files import check_hf_directory
from megavar.verifiers import WorkerPool
from megavar.verifiers.sandbox import say_isolation

if TYPE_CHECKING:
    from rich.table import Table

    from megavar.data.templates import Encoder, Template
    from megavar.rollout.engine import Engine, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The command's options over the recipe's sections, or over their defaults."""

    source: QuestionSource
    template: Template
    asked: Evaluate
    rollout: Rollout
    seed: int
    """Of completions."""


@dataclass(slots=True)
class Tally:
    """What has been seen so far, in the questions' order."""

    correct: list[list[float]] = field(default_factory=list)
    """Per question, 1 or 0 per sample."""
    votes: list[float] = field(default_factory=list)
    """Per question, correctness of the answer given most often."""
    sources: list[str] = field(default_factory=list)
    completions: int = 0
    truncated: int = 0
    open: int = 0
    tokens: int = 0


def run(args: argparse.Namespace) -> int:
    """Sample, verify, print the table; raises UserError for bad input before the model is loaded."""
    architecture = read_architecture(args.model)
    check_hf_directory(args.model, architecture)
    if args.out is not None and args.suite is None:
        check_output(args.out)
    if not any(args.model.glob("tokenizer*")):
        raise UserError(f"{args.model}: no tokenizer; put its files there")
    if args.suite is not None:
        return eval_suite.run(args, architecture, policy_template(args.template, Templates()))
    if args.data_dir is not None or args.preset is not None:
        raise UserError("--data-dir and --preset are for --suite")
    plan = make_plan(args)

    from rich.console import Console
    from transformers import AutoTokenizer

    from megavar.data.questions import load_questions
    from megavar.data.templates import Encoder, check_lengths
    from megavar.phases.requests import stopping
    from megavar.progress import Progress
    from megavar.report.show import PLAIN_WIDTH
    from megavar.rollout.engine import SamplingParams

    questions = load_questions(plan.source)
    if any(question.verifier == "code" for question in questions):
        say_isolation()
    encoder = Encoder(plan.template, AutoTokenizer.from_pretrained(args.model, local_files_only=True))
    context = min(architecture.max_positions, plan.rollout.context_length or architecture.max_positions)
    check_lengths(encoder, questions, context)
    params = SamplingParams(
        temperature=plan.asked.temperature,
        top_p=plan.asked.top_p,
        max_tokens=plan.asked.max_tokens,
        context_length=plan.rollout.context_length,
    )
    tally = Tally()
    with ExitStack() as stack:
        sampler = stack.enter_context(engine(args, architecture, plan.rollout, None))
        pool = stack.enter_context(WorkerPool(len(os.sched_getaffinity(0))))
        writer = stack.enter_context(TableWriter(args.out, RECORDS)) if args.out is not None else None
        task = stack.enter_context(Progress().phase("eval", len(questions), "questions"))
        size = plan.rollout.questions_per_part
        for start in range(0, len(questions), size):
            part = questions[start : start + size]
            rows = _sample(sampler, encoder, stopping(params, encoder, whole=True), plan, part)
            verify_rows(rows, {q.id: q for q in part}, pool)
            _count(tally, rows, part, plan.asked.samples)
            if writer is not None:
                writer.write(pa.RecordBatch.from_pylist(rows, RECORDS))
            task.advance(len(part))
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(_table(tally, title=f"{args.model} on {args.data}", samples=plan.asked.samples))
    console.print(_described(tally, plan), markup=False, highlight=False, soft_wrap=True)
    return 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Read `--data` and lay the options over it. Raises UserError: no such data, unknown template, no size."""
    given = {name: getattr(args, name) for name in ("samples", "temperature", "top_p", "max_tokens")}
    recipe: Recipe | None = None
    if args.data.endswith(".toml"):
        recipe = load_recipe(args.data)
        changes: dict[str, Any] = {"size": args.size, "verifier": args.verifier or None}
        source = recipe.data.eval.model_copy(update={k: v for k, v in changes.items() if v is not None})
    else:
        source = _source(args)
    templates = recipe.templates if recipe else Templates()
    asked = recipe.evaluate if recipe else Evaluate()
    rollout = recipe.rollout if recipe else Rollout()
    return Plan(
        source=source,
        template=policy_template(args.template, templates),
        asked=asked.model_copy(update={name: value for name, value in given.items() if value is not None}),
        rollout=rollout,
        # As a run's own evaluation, so that the same model gives the same completions.
        seed=rollout.seed if args.seed is None else args.seed,
    )


def _source(args: argparse.Namespace) -> QuestionSource:
    common: dict[str, Any] = {"size": args.size, "verifier": args.verifier}
    kind, _, name = args.data.partition(":")
    if kind == "gym":
        if args.size is None:
            raise UserError(f"--data {args.data}: say how many questions to generate: --size N")
        return QuestionSource(kind="reasoning_gym", name=name, seed=args.seed or 0, **common)
    path = Path(args.data)
    if path.suffix == ".jsonl":
        return QuestionSource(kind="jsonl", path=path, **common)
    if path.suffix == ".parquet":
        return QuestionSource(kind="parquet", path=path, **common)
    if path.is_dir():
        return QuestionSource(kind="hf_dataset", path=path, **common)
    raise UserError(
        f"--data {args.data}: give gym:NAME, a .jsonl or .parquet file, a data set directory or a recipe"
    )


def policy_template(asked: str | None, templates: Templates) -> Template:
    """The template that `--template` asks for, by name or by the recipe whose policy's it is; else `templates.policy`.

    Raises UserError for an unknown name and for a template that shows the solution.
    """
    from megavar.data.templates import known_templates

    if asked is not None and asked.endswith(".toml"):
        templates, asked = load_recipe(asked).templates, None
    name, known = asked or templates.policy, known_templates(templates)
    if name not in known:
        raise UserError(
            f"--template {name}: no such template (RECIPE.toml takes a recipe's own); {did_you_mean(name, known)}"
        )
    if "solution" in known[name].placeholders:
        raise UserError(f"--template {name} shows the solution; choose a policy's template")
    return known[name]


def _sample(
    sampler: Engine, encoder: Encoder, params: SamplingParams, plan: Plan, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """The rows of these questions, in their order, not yet scored."""
    from megavar.phases.run import sampling_seeds
    from megavar.rollout.engine import Request

    requests = [
        Request(
            id=q.id,
            prompt_ids=encoder.prompt_ids(q),
            seeds=sampling_seeds(plan.seed, "policy", q.id, plan.asked.samples),
        )
        for q in questions
    ]
    place = {q.id: n for n, q in enumerate(questions)}
    rows = [
        sample_row(c, questions[place[c.request_id]], encoder) for c in sampler.generate(requests, params)
    ]
    return sorted(rows, key=lambda row: (place[row["question_id"]], row["index"]))


def _count(tally: Tally, rows: list[dict[str, Any]], questions: Sequence[Question], samples: int) -> None:
    for place, question in enumerate(questions):
        own = rows[place * samples : (place + 1) * samples]
        correct = [float(row["correct"]) for row in own]
        tally.correct.append(correct)
        tally.votes.append(majority_vote([vote(row, question) for row in own], correct))
        tally.sources.append(question.source)
    tally.completions += len(rows)
    tally.truncated += sum(row["finish_reason"] == "length" for row in rows)
    tally.open += sum(not row["closed"] for row in rows)
    tally.tokens += sum(row["tokens"] for row in rows)


def _described(tally: Tally, plan: Plan) -> str:
    asked, count = plan.asked, tally.completions
    return (
        f"template {plan.template.name}, temperature {asked.temperature:g}, top-p {asked.top_p:g}, seed {plan.seed}; "
        f"{count} completions of {tally.tokens / count:.1f} tokens on average, {tally.truncated} cut off, "
        f"{tally.open} without an end of thought"
    )


def _table(tally: Tally, *, title: str, samples: int) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
    for name in ("metric", "value", "95% interval", "questions", "samples"):
        table.add_column(name, justify="left" if name == "metric" else "right")

    def line(metric: str, scores: Sequence[ArrayLike]) -> None:
        found = accuracy(scores)
        interval = f"[{found.low:.4f}, {found.high:.4f}]"
        table.add_row(escape(metric), f"{found.mean:.4f}", interval, str(found.questions), str(found.samples))

    line("accuracy", tally.correct)
    sources = sorted(set(tally.sources))
    for source in sources if len(sources) > 1 else ():
        chosen = [c for c, s in zip(tally.correct, tally.sources, strict=True) if s == source]
        line(f"accuracy: {source or 'no source'}", chosen)
    if samples > 1:
        counts = np.array([sum(c) for c in tally.correct], dtype=np.int64)
        k = 2
        while k <= samples:
            line(f"pass@{k}", pass_at_k(np.full(len(counts), samples), counts, k).tolist())
            k *= 2
        line(f"majority of {samples}", tally.votes)
    return table
