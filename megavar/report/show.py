"""`megavar show RUN`: the phases of a run directory and the table of its arms, from the files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.config.load import load_recipe
from megavar.errors import UserError
from megavar.progress import duration
from megavar.runs import TABLE, RunDirectory, phase_status

PLAIN_WIDTH = 160
"""Columns of the tables where there is no terminal to fit them to."""


def show(path: Path, console: Console | None = None) -> int:
    """Print the tables of a run; returns 0. Raises UserError where `path` is not a run directory."""
    if not (path / "recipe.toml").is_file():
        raise UserError(f"{path}: not a run directory: it has no recipe.toml")
    console = console or Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    recipe = load_recipe(path / "recipe.toml")
    run = RunDirectory(path, recipe, writer=False, lock=None)
    console.print(f"{recipe.name}: {path}", markup=False, highlight=False)
    console.print(phase_table(run))
    if (path / TABLE).is_file():
        console.print(arms_table(path / TABLE))
    return 0


def phase_table(run: RunDirectory) -> Table:
    """Phases in the order in which they were started."""
    table = Table("phase", "status", "counts", "time", "metrics", box=None, pad_edge=False)
    for directory in run.phases():
        status, manifest = phase_status(directory)
        table.add_row(
            directory.relative_to(run.path).as_posix(),
            status,
            _pairs(manifest["counts"]) if manifest else "",
            duration(manifest["seconds"]) if manifest else "",
            _pairs(manifest["metrics"]) if manifest else "",
        )
    return table


def arms_rows(path: Path) -> tuple[Sequence[Mapping[str, Any]], list[str]]:
    """Rows and columns of the comparison that a finished run stores: `{"rows": [{column: value, ...}, ...]}`.

    Raises UserError where the file is something else.
    """
    try:
        rows: Sequence[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return rows, list(dict.fromkeys(column for row in rows for column in row))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a table of arms ({error}); run again to rewrite it") from None


def arms_table(path: Path) -> Table:
    """See `arms_rows`."""
    rows, columns = arms_rows(path)
    table = Table(title="arms", title_justify="left", box=None, pad_edge=False)
    for column in columns:
        numeric = all(isinstance(row.get(column), (int, float)) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(cell(row.get(column, "")) for column in columns))
    return table


def _pairs(values: Mapping[str, Any]) -> str:
    shown = (f"{name} {cell(value)}" for name, value in values.items() if not isinstance(value, dict))
    return ", ".join(shown)


def cell(value: Any) -> str:
    """A value of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(cell(element) for element in value) + "]"
    return "" if value is None else str(value)
