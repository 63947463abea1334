"""`megavar sync plan`: what a synchronisation moves between two layouts, and the least time it can take."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.errors import UserError
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.parallel_layout import ParallelLayout
from megavar.report.show import PLAIN_WIDTH
from megavar.sync.engine_layout import EngineLayout
from megavar.sync.floors import INTERCONNECTS, Traffic, traffic
from megavar.sync.plan import Plan, plan

TRAINER_SIZES = ("ranks", "tp", "pp", "vpp", "cp", "ep", "etp")
ENGINE_SIZES = ("tp", "ep", "count")


def run(args: argparse.Namespace) -> int:
    """Print the plan's figures; returns 0. Raises UserError for layouts that do not fit model or each other."""
    if args.action == "verify":
        from megavar.commands import sync_verify

        return sync_verify.run(args)
    directory = args.model.parent if args.model.name == "config.json" else args.model
    sizes = parse_sizes("--engine", args.engine, ENGINE_SIZES)
    engines = sizes.pop("count", 1)
    engine = EngineLayout(dtype=args.dtype or read_architecture(directory).dtype, **sizes)
    show_plan(directory, trainer_layout(args.trainer), engine, engines, as_json=args.json)
    return 0


def show_plan(
    model: Path, trainer: ParallelLayout, engine: EngineLayout, engines: int, *, as_json: bool = False
) -> None:
    """Print the figures of the plan. model: directory with a config.json. Raises UserError as `plan` does."""
    architecture = read_architecture(model)
    started = time.perf_counter()
    made = plan(architecture, trainer, engine, engines)
    seconds = time.perf_counter() - started
    figures = traffic(made)
    if as_json:
        print(json.dumps(_json(made, figures, seconds), indent=1))
    else:
        _print(Console(), model, architecture, made, figures, seconds)


def trainer_layout(text: str) -> ParallelLayout:
    """`tp=4,pp=2` as a layout, of the fewest ranks that hold it where `ranks` is left out."""
    sizes = parse_sizes("--trainer", text, TRAINER_SIZES)
    if "ranks" not in sizes:
        tp, cp, ep, etp, pp = (max(1, sizes.get(name, 1)) for name in ("tp", "cp", "ep", "etp", "pp"))
        sizes["ranks"] = math.lcm(tp * cp, etp * ep) * pp
    return ParallelLayout(**sizes)


def parse_sizes(option: str, text: str, known: Sequence[str]) -> dict[str, int]:
    """`name=N,name=N`. Raises UserError that names option, field and fix."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in known:
            raise UserError(f"{option} {text}: unknown size {name!r}; expected one of {', '.join(known)}")
        if name in sizes:
            raise UserError(f"{option} {text}: {name} is given twice")
        if not equals or not value.isdecimal():
            raise UserError(f"{option} {text}: {name} needs a whole number: {name}=N")
        sizes[name] = int(value)
    return sizes


def _json(made: Plan, figures: Traffic, seconds: float) -> dict[str, Any]:
    """Every figure of the tables, and the bytes of every link."""
    return {
        "fingerprint": made.fingerprint,
        "planning_s": round(seconds, 4),
        "trainer_ranks": made.trainer.ranks,
        "engines": made.engines,
        "dtype": made.engine.dtype,
        "model_bytes": figures.model,
        "receiver_bytes": list(figures.receivers),
        "sender_bytes": list(figures.senders),
        "links": [
            {"sender": sender, "engine": engine, "rank": rank, "bytes": size}
            for (sender, engine, rank), size in figures.links.items()
        ],
        "seconds": {
            through.name: {
                "receiver_floor": figures.receiver_floor(through),
                "sender_floor": figures.sender_floor(through),
                "expected": figures.expected(through),
                "broadcast_floor": figures.broadcast_floor(through),
            }
            for through in INTERCONNECTS
        },
    }


def _print(
    console: Console, directory: Path, a: Architecture, made: Plan, figures: Traffic, seconds: float
) -> None:
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    t, e = made.trainer, made.engine
    trainer = ", ".join(f"{n}={getattr(t, n)}" for n in TRAINER_SIZES if n == "ranks" or getattr(t, n) > 1)
    engine = ", ".join(f"{n}={getattr(e, n)}" for n in ("tp", "ep") if n == "tp" or getattr(e, n) > 1)
    console.print(
        f"{directory.absolute().name} ({a.family}): {_size(figures.model)} in {e.dtype}\n"
        f"trainer: {trainer}; replicas: {t.dp * t.cp}" + (f", of experts: {t.edp}" if a.is_moe else "") + "\n"
        f"engines: {made.engines} x ({engine})\n"
        f"plan {made.fingerprint[:12]}, made in {seconds:.2f} s",
        highlight=False,
    )
    ends = Table("on the wire", "number", "least", "mean", "most")
    rows = (
        ("per receiver", figures.receivers, made.engines * e.tp),
        ("per sender", figures.senders, t.ranks),
        ("per link", tuple(figures.links.values()), len(figures.links)),
    )
    for name, sizes, number in rows:
        mean = sum(sizes) / len(sizes)
        ends.add_row(name, str(number), _size(min(sizes)), _size(mean), _size(max(sizes)))
    times = Table("seconds", "receivers' floor", "senders' floor", "expected", "broadcast's floor")
    for through in INTERCONNECTS:
        floors = (figures.receiver_floor(through), figures.sender_floor(through))
        columns = (*floors, figures.expected(through), figures.broadcast_floor(through))
        times.add_row(
            f"{through.name} ({through.bytes_per_s / 1e9:.0f} GB/s)", *(f"{s:.4f}" for s in columns)
        )
    for table in (ends, times):
        table.box = None
        table.pad_edge = False
        console.print()
        console.print(table)


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"
