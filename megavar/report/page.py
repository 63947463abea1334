"""`megavar report RUN`: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megavar import __version__
from megavar.config.load import dump_recipe
from megavar.files import write_atomically
from megavar.progress import duration
from megavar.report import charts, svg
from megavar.report.memory import MemoryRow
from megavar.report.show import arms_rows, cell
from megavar.report.stored import StoredPhase, StoredRun
from megavar.runs import TABLE

INTERVAL = "95% interval"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    id: str
    title: str
    charts: Sequence[svg.Chart]
    otherwise: str
    """What is said where there is no chart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A phase on the time line; places in percent."""

    phase: StoredPhase
    left: float
    width: float
    worked: float
    """Share of the width that the finishing process took, at its end."""
    kind: str
    text: str


def write_page(
    run: StoredRun,
    out: Path,
    *,
    expected: Sequence[str],
    model: str,
    memory: Sequence[MemoryRow],
    unplanned: str,
) -> None:
    """Write the report; the same run gives the same bytes but for the moment it is written.

    expected: phases of a whole run; model: in words; memory: plan against measurement, or `unplanned`: why none.
    """
    environment = Environment(
        loader=PackageLoader("megavar.report", ""),
        autoescape=lambda name: name != "page.css",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "duration": duration, "bytes": _bytes}
    missing = [name for name in expected if name not in run.phases or not run.phases[name].done]
    text = environment.get_template("page.html.j2").render(
        run=run,
        svg=svg,
        version=__version__,
        model=model,
        layout=_layout(run),
        status=_status(run, expected, missing),
        missing=missing,
        versions=_versions(run),
        times=_times(run),
        arms=_arms(run),
        interval=INTERVAL,
        warnings=[(phase.name, text) for phase in run.phases.values() for text in phase.warnings],
        sections=_sections(run),
        timeline=_timeline(run),
        memory=memory,
        unplanned=unplanned,
        numbers=_numbers(run),
        recipe=dump_recipe(run.recipe),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(out, text)


def _sections(run: StoredRun) -> list[Section]:
    found = [
        ("loss", "Loss", charts.losses(run) + charts.speeds(run), "No fit has taken a step yet."),
        (
            "bound",
            "Bound and bias",
            charts.bounds(run) + charts.bias(run),
            "No training set of weighted traces is finished yet.",
        ),
        ("weights", "Weights and effective sample sizes", charts.weights(run), "No weights are stored yet."),
        ("lengths", "Lengths", charts.lengths(run), "Nothing has been sampled yet."),
        (
            "gap",
            "Engine and trainer",
            charts.gaps(run),
            "No sampled traces have been scored by their own model yet.",
        ),
    ]
    if run.recipe.rounds > 1:
        found.insert(1, ("rounds", "Rounds", charts.by_round(run), "No round is finished yet."))
    return [Section(id=i, title=t, charts=c, otherwise=o) for i, t, c, o in found]


def _status(run: StoredRun, expected: Sequence[str], missing: Sequence[str]) -> str:
    if not missing:
        return "finished"
    under_way = [name for name, phase in run.phases.items() if not phase.done]
    where = f", in {under_way[-1]}" if under_way else ""
    return f"{len(expected) - len(missing)} of {len(expected)} phases finished{where}"


def _layout(run: StoredRun) -> str:
    layout, trainer = run.recipe.trainer.layout, run.recipe.trainer
    split = " × ".join(f"{name} {getattr(layout, name)}" for name in ("tp", "cp", "dp", "pp"))
    experts = f", ep {layout.ep}" if layout.ep > 1 else ""
    ranks = "rank" if trainer.ranks == 1 else "ranks"
    engine = run.recipe.rollout.engine
    fleets = " + ".join(str(len(f.urls) or f.count) for f in run.recipe.rollout.fleets)
    engines = "in-process engine" if engine == "local" else f"{fleets} SGLang servers"
    return f"{trainer.ranks} {ranks} = {split}{experts}; {engines}; {run.recipe.model.dtype}"


def _versions(run: StoredRun) -> dict[str, str]:
    """Each package's versions over all phases."""
    found: dict[str, dict[str, None]] = {}
    for phase in run.phases.values():
        for name, version in phase.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _times(run: StoredRun) -> dict[str, str]:
    phases = list(run.phases.values())
    if not phases:
        return {}
    ends = [phase.finished for phase in phases if phase.finished]
    worked = sum(phase.seconds or 0.0 for phase in phases)
    found = {"started": phases[0].started.strftime("%Y-%m-%d %H:%M UTC")}
    if ends:
        found |= {
            "last phase finished": max(ends).strftime("%Y-%m-%d %H:%M UTC"),
            "time in finished phases": duration(worked),
        }
    return found


def _arms(run: StoredRun) -> dict[str, Any]:
    """Rows of the table of arms; of an unfinished run what its evaluations say so far."""
    table = run.path / TABLE
    rows: Sequence[Mapping[str, Any]]
    if table.exists():
        rows, columns = arms_rows(table)
    else:
        rows = [
            {
                "arm": phase.name.removesuffix("/verdicts").removeprefix("eval/"),
                "accuracy": round(phase.metrics["eval/correct"], 4),
                "answers": phase.counts.get("answers", ""),
            }
            for phase in run.done("/verdicts")
            if "eval/correct" in phase.metrics
        ]
        columns = list(rows[0]) if rows else []
    numeric = {
        c
        for c in columns
        if all(isinstance(row.get(c), (int, float)) or row.get(c) in ("", None) for row in rows)
    }
    top = max((row[INTERVAL][1] for row in rows if row.get(INTERVAL)), default=0.0) or 1.0
    return {"rows": rows, "columns": columns, "numeric": numeric, "top": top, "final": table.exists()}


def _timeline(run: StoredRun) -> list[Bar]:
    phases = list(run.phases.values())
    if not phases:
        return []
    start = min(phase.started for phase in phases)
    end = max(phase.finished or phase.started for phase in phases)
    whole = max((end - start).total_seconds(), 1e-3)
    bars = []
    for phase in phases:
        left = (phase.started - start).total_seconds() / whole * 100
        span = (phase.finished - phase.started).total_seconds() if phase.finished else 0.0
        worked = min(1.0, (phase.seconds or 0.0) / span) if span else 1.0
        bars.append(
            Bar(
                phase=phase,
                left=round(left, 2),
                width=round(max(span / whole * 100, 0.3), 2),
                worked=round(100 * worked, 1),
                kind=_kind(phase.name),
                text=duration(phase.seconds) if phase.seconds is not None else phase.status,
            )
        )
    return bars


def _kind(name: str) -> str:
    """What a phase does, by its last word."""
    last = name.rsplit("/", 1)[-1]
    if last.endswith("scores"):
        return "score"
    return {"fit": "fit", "traces": "sample", "answers": "sample", "verdicts": "verify"}.get(last, "data")


def _numbers(run: StoredRun) -> dict[str, Any]:
    """Metrics of the training sets of policies side by side, those of single k and of bins aside."""
    phases = [p for p in run.done("/data") if p.series.startswith(("arms/", "policy/")) and p.metrics]
    names = dict.fromkeys(n for p in phases for n in p.metrics if not n[-1].isdigit())
    return {"phases": phases[-12:], "names": list(names)}


def _bytes(value: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value:.0f} B"
