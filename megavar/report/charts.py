"""The charts of a run, by section; a section without data is empty."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megavar.report import streamed
from megavar.report.stored import StoredPhase, StoredRun
from megavar.report.svg import Chart, Curve, Point, histogram, line_chart, scatter, short

MOST_ROUNDS = 8
"""Rounds that get a curve each."""
_BIN = re.compile(r"vr/question_(weight|mass)_p(\d{3})")


def losses(run: StoredRun) -> list[Chart]:
    """One chart for all arms, one for each other fit; rounds are one curve."""
    found = run.curves["train/loss"]
    arms = {series: values for series, values in found.items() if series.startswith("arms/")}
    charts = [_curves(run, "Loss of the arms", arms, "loss")] if arms else []
    others = [(series, values) for series, values in found.items() if series not in arms]
    return charts + [_curves(run, f"Loss: {series}", {series: values}, "loss") for series, values in others]


def speeds(run: StoredRun) -> list[Chart]:
    """Tokens per second of the fits, and gradient norms."""
    wanted = (
        ("train/grad_norm", "Gradient norm", "norm before clipping"),
        ("perf/tokens_per_second", "Training speed", "tokens per second"),
    )
    return [_curves(run, title, run.curves[name], label) for name, title, label in wanted if run.curves[name]]


def _curves(
    run: StoredRun, title: str, found: Mapping[str, Sequence[tuple[int, float]]], label: str
) -> Chart:
    curves = [
        Curve(
            name=_arm(series),
            points=[Point(x=x, y=y) for x, y in values if math.isfinite(y)],
            number=_number(run, series),
        )
        for series, values in found.items()
    ]
    return line_chart(title, [c for c in curves if c.points], x_label="optimizer step", y_label=label)


def bounds(run: StoredRun) -> list[Chart]:
    """L_1 to L_K of the training sets of weighted traces, with the standard errors over questions."""
    curves = []
    for phase in _weighed(run, "vr/bound_1"):
        points = []
        k = 1
        while (value := phase.metrics.get(f"vr/bound_{k}")) is not None:
            error = phase.metrics.get(f"vr/bound_se_{k}")
            share = phase.metrics.get(f"vr/bound_finite_{k}", math.nan)
            if math.isfinite(value):
                title = f"{_name(phase)}: L_{k} = {value:.4g}" + (f" ± {error:.2g}" if error else "")
                points.append(
                    Point(
                        x=k,
                        y=value,
                        low=value - error if error else None,
                        high=value + error if error else None,
                        title=f"{title}, finite for {share:.0%} of the questions",
                    )
                )
            k += 1
        if points:
            curves.append(
                Curve(name=_name(phase), points=points, number=_number(run, phase.series) + phase.round)
            )
    if not curves:
        return []
    note = (
        "Mean over the questions where it is finite; bars are one standard error. A lower bound of log P for the full "
        "ratio alone."
    )
    return [line_chart("Bound L_k", curves, x_label="traces k", y_label="nats", note=note, dots=True)]


def by_round(run: StoredRun) -> list[Chart]:
    """Of an online run: accuracy, bound and effective sample size over the rounds."""
    wanted = (
        ("eval/correct", "eval/verdicts", "Held-out accuracy by round", "share right"),
        (f"vr/bound_{run.recipe.rollout.traces}", "policy/data", "Bound by round", "nats"),
        ("vr/ess", "policy/data", "Effective sample size by round", "of K traces"),
    )
    charts = []
    for metric, series, title, label in wanted:
        phases = [p for p in run.phases.values() if p.round and p.series == series and metric in p.metrics]
        points = [
            Point(x=p.round, y=p.metrics[metric], title=f"round {p.round}: {p.metrics[metric]:.4g}")
            for p in phases
            if math.isfinite(p.metrics[metric])
        ]
        if points:
            curve = Curve(name=title, points=points)
            charts.append(line_chart(title, [curve], x_label="round", y_label=label, dots=True))
    return charts


def weights(run: StoredRun) -> list[Chart]:
    """Histograms of weights and of effective sample sizes."""
    charts = []
    for phase in _chosen([p for p in run.done("/data") if (p.path / "weights").is_dir()]):
        store, name = phase.path / "weights", _name(phase)
        columns = streamed.columns_of(store)
        if "normalised" in columns:
            edges, counts = streamed.effective_sizes(store, run.recipe.rollout.traces)
            charts.append(_bars(f"Effective sample size: {name}", edges, counts, "1 / Σ ρ̃² of a question"))
            edges, counts = streamed.values(store, "normalised")
            charts.append(_bars(f"Weights: {name}", edges, counts, "ρ̃ of a trace, before selection"))
        elif "thought" in columns:
            edges, counts = streamed.values(store, "thought")
            charts.append(_bars(f"Weights: {name}", edges, counts, "weight of a thought"))
    return charts


def lengths(run: StoredRun) -> list[Chart]:
    """Tokens of samples, by finish reason; all evaluations together, of the others each phase's newest round."""
    groups: dict[str, tuple[list[Path], list[str]]] = {}
    for phase in run.phases.values():
        for folder, columns in (("traces", ["thought_ids", "answer_ids"]), ("answers", ["ids"])):
            if streamed.parts_of(phase.path / folder):
                if "eval/" in f"{phase.name}/":
                    groups.setdefault("evaluation", ([], columns))[0].append(phase.path / folder)
                else:
                    groups[phase.series] = ([phase.path / folder], columns)
    charts = []
    for name, (stores, columns) in groups.items():
        found = streamed.lengths(stores, columns)
        if not found:
            continue
        longest = max(len(counts) for counts in found.values()) - 1
        edges = streamed.length_edges(longest)
        # "stop" first, so that it has the same colour everywhere.
        reasons = sorted(found, key=lambda reason: (reason != "stop", reason))
        layers = [(reason, streamed.binned(found[reason], edges)) for reason in reasons]
        said = ", ".join(f"{int(found[reason].sum())} {reason}" for reason in reasons)
        charts.append(
            histogram(f"Length: {name}", edges.tolist(), layers, x_label="tokens", note=f"samples: {said}")
        )
    return charts


def gaps(run: StoredRun) -> list[Chart]:
    """Log-probs of the same tokens by trainer and engine."""
    charts = []
    for phase in _chosen(
        [p for p in run.done("/posterior_scores") if "rollout/logprob_gap_max" in p.metrics]
    ):
        found = streamed.gaps(phase.path.parent / "traces" / "traces", phase.path / "scores")
        pairs = zip(found.engine.tolist(), (found.trainer - found.engine).tolist(), strict=True)
        points = [Point(x=x, y=y) for x, y in pairs]
        if points:
            mean, most = (phase.metrics[f"rollout/logprob_gap_{name}"] for name in ("mean", "max"))
            note = f"{len(points)} tokens of {phase.name}; over all: mean |gap| {mean:.2g}, largest {most:.2g} nats"
            charts.append(
                scatter(
                    f"Trainer minus engine: {_name(phase)}",
                    points,
                    x_label="log-prob by the engine",
                    y_label="difference, nats",
                    note=note,
                )
            )
    return charts


def bias(run: StoredRun) -> list[Chart]:
    """What a question counts for, by how often the policy gets it right."""
    charts = []
    labels = [(0.0, "0"), (0.25, "≤ ¼"), (0.5, "≤ ½"), (0.75, "≤ ¾"), (1.0, "≤ 1")]
    for kind, title, y_label in (
        ("weight", "Implied question weight", "factor of ∇KL"),
        ("mass", "Question mass", "Σ |weight| of a question"),
    ):
        curves = []
        for phase in _weighed(run, None):
            points = []
            for name, value in phase.metrics.items():
                match = _BIN.fullmatch(name)
                if match and match[1] == kind and math.isfinite(value):
                    count = phase.metrics.get(f"vr/questions_p{match[2]}", 0)
                    said = f"{_name(phase)}: {value:.4g} over {count:.0f} questions"
                    points.append(Point(x=int(match[2]) / 100, y=value, title=said))
            if points:
                points.sort(key=lambda p: p.x)
                number = _number(run, phase.series) + phase.round
                curves.append(Curve(name=_name(phase), points=points, number=number))
        if curves:
            charts.append(
                line_chart(
                    title,
                    curves,
                    x_label="accuracy of the policy",
                    y_label=y_label,
                    dots=True,
                    x_ticks=labels,
                )
            )
    return charts


def _bars(title: str, edges: np.ndarray, counts: Sequence[int], x_label: str) -> Chart:
    note = f"{sum(counts)} in all, from {short(float(edges[0]))} to {short(float(edges[-1]))}"
    return histogram(title, edges.tolist(), [("", counts)], x_label=x_label, note=note)


def _weighed(run: StoredRun, metric: str | None) -> list[StoredPhase]:
    """Training sets of policies, which have this metric."""
    found = [p for p in run.done("/data") if p.series.startswith(("arms/", "policy/"))]
    return _chosen([p for p in found if metric is None or metric in p.metrics])


def _chosen(phases: Sequence[StoredPhase]) -> list[StoredPhase]:
    """All of an offline run; of an online one first, last and evenly spaced rounds between."""
    if not phases or not any(p.round for p in phases) or len(phases) <= MOST_ROUNDS:
        return list(phases)
    return [
        phases[i]
        for i in sorted({round(n * (len(phases) - 1) / (MOST_ROUNDS - 1)) for n in range(MOST_ROUNDS)})
    ]


def _number(run: StoredRun, series: str) -> int:
    """Of a colour: arms in the recipe's order, other phases as they come."""
    arms = [arm.name for arm in run.recipe.arms]
    if (name := _arm(series)) in arms:
        return arms.index(name)
    others = list(dict.fromkeys(s for s in run.curves["train/loss"] if not s.startswith("arms/")))
    return len(arms) + others.index(series) if series in others else 0


def _name(phase: StoredPhase) -> str:
    return f"round {phase.round}, {_arm(phase.series)}" if phase.round else _arm(phase.series)


def _arm(series: str) -> str:
    """ "acc" of "arms/acc/data"."""
    parts = series.split("/")
    return parts[1] if parts[0] == "arms" and len(parts) > 2 else series
