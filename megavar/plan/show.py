"""A plan as tables for a reader, and as JSON for a program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from megavar.plan import memory, work
from megavar.plan.memory import GIB, StageMemory, worst
from megavar.plan.parameters import model_parameters
from megavar.plan.plan import SERVER_FRACTION, Plan
from megavar.plan.request import Request
from megavar.plan.search import changes

PLAIN_WIDTH = 140
"""Columns where there is no terminal to fit to."""
_NODES_DRAWN = 4


def show(plan: Plan, fix: Plan | None, console: Console | None = None) -> None:
    """Print the plan and, where it does not fit, the change that does."""
    console = console or Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH

    def line(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for text in (*_heading(plan.request), "", *draw(plan.request), ""):
        line(text)
    for title, stages in _phases(plan).items():
        console.print(_memory_table(title, stages, plan.request))
        line()
    console.print(_steps_table(plan))
    line()
    for text in (*_round(plan), "", *_assumptions(plan.request), "", *verdict(plan, fix)):
        line(text)
    if fix is not None:
        line()
        for title, stages in _phases(fix).items():
            console.print(_memory_table(f"changed: {title}", stages, fix.request))


def as_json(plan: Plan, fix: Plan | None) -> str:
    """One object: layout, peaks and memory in bytes, steps, round, verdict, and the same of the change that fits."""
    report = _report(plan)
    if fix is not None:
        report["fix"] = {"changes": changes(plan.request, fix.request), **_report(fix)}
    elif not plan.fits:
        report["fix"] = None
    return json.dumps(report, indent=1)


def verdict(plan: Plan, fix: Plan | None) -> list[str]:
    """Whether it fits, and the cheapest change that does."""
    kind, peak = max(plan.peaks.items(), key=lambda item: item[1])
    size = f"{_gib(peak)} of {_gib(plan.request.gpu_bytes)} GiB"
    if plan.fits:
        return [f"fits: {kind} takes the most, {size}"]
    lines = [f"out of memory: {kind}{_worst_stage(plan, kind)} would take {size}"]
    if fix is None:
        engine = " with the engine on the same GPUs" if plan.request.shares_gpus else ""
        lines.append(
            f"no split over {plan.request.layout.ranks} GPUs fits{engine}; take more GPUs (--gpus) or shorter traces"
        )
        return lines
    options = " ".join(
        f"--{key} {str(value).lower()}" for key, value in changes(plan.request, fix.request).items()
    )
    slower = fix.step_seconds / plan.step_seconds - 1
    lines.append(f"cheapest change that fits: {options}")
    lines.append(f"then {_gib(fix.peak)} GiB at most; the longest step computes for {slower:+.0%} longer")
    return lines


def draw(request: Request) -> list[str]:
    """Which rank is what, one row a node; and which layers each stage holds."""
    layout = request.layout
    split = [f"{name} {getattr(layout, name)}" for name in ("tp", "cp", "dp", "pp")]
    lines = [f"layout: {layout.ranks} ranks = " + " x ".join(split)]
    if layout.vpp > 1:
        lines[0] += f", {layout.vpp} chunks per stage"
    if request.architecture.is_moe:
        lines[0] += f"; experts: etp {layout.etp} x ep {layout.ep} x edp {layout.edp} x pp {layout.pp}"
    names = [n for n in ("pp", "dp", "cp", "tp", "ep", "etp") if n == "dp" or getattr(layout, n) > 1]
    cells = [" ".join(f"{name}{getattr(place, name)}" for name in names) for _, place in layout.places()]
    width, per_node = max(map(len, cells)), request.gpus_per_node
    nodes = range(0, layout.ranks, per_node)
    for number, first in list(enumerate(nodes))[:_NODES_DRAWN]:
        row = "  ".join(cell.ljust(width) for cell in cells[first : first + per_node])
        lines.append(f"  node {number}: {row}".rstrip())
    if len(nodes) > _NODES_DRAWN:
        lines.append(f"  ... {len(nodes)} nodes")
    for stage in range(layout.pp):
        lines.append(f"  stage {stage}: {_stage_holds(request, stage)}")
    return lines


def _stage_holds(request: Request, stage: int) -> str:
    layout, layers = request.layout, request.architecture.num_layers
    size = layers // (layout.pp * layout.vpp)
    firsts = [(chunk * layout.pp + stage) * size for chunk in range(layout.vpp)]
    parts = ["layers " + ", ".join(f"{first}-{first + size - 1}" for first in firsts)]
    if stage == 0:
        parts.insert(0, "embedding")
    if stage == layout.pp - 1:
        parts.append("output projection")
    return ", ".join(parts)


def _heading(request: Request) -> list[str]:
    a, o = request.architecture, request.operators
    total, active = model_parameters(a)
    of_them = f", {active / 1e9:.2f}B active" if active != total else ""
    sharded = ", sequence parallel" if o.sequence_parallel else ""
    dtype = ("bfloat16" if o.item == 2 else "float32") + (" (projections in FP8)" if o.fp8 else "")
    return [
        f"{a.family}: {total / 1e9:.2f}B parameters{of_them}, {a.num_layers} layers, hidden {a.hidden_size}, "
        f"vocabulary {a.vocab_size}",
        f"{dtype}, recompute {o.recompute}{sharded}; operators: {o.stack}; "
        f"GPUs of {_gib(request.gpu_bytes)} GiB",
        f"micro-batches of at most {request.training_tokens} tokens in training, {request.scoring_tokens} in scoring",
    ]


def _phases(plan: Plan) -> dict[str, Sequence[StageMemory]]:
    found: dict[str, Sequence[StageMemory]] = {"training": plan.training, "scoring": plan.scoring}
    return found if plan.sampling is None else {**found, "sampling in process": (plan.sampling,)}


def _memory_table(title: str, stages: Sequence[StageMemory], request: Request) -> Table:
    names = [f.name for f in fields(StageMemory) if any(getattr(stage, f.name) for stage in stages)]
    heads = {"logprob": "log-probs", "layer": "layer at work"}
    table = Table(f"{title}, GiB", *(heads.get(n, n) for n in names), "peak", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    heaviest = worst(stages)
    for number, stage in enumerate(stages):
        mark = "  <- most" if number == heaviest and len(stages) > 1 else ""
        name = f"stage {number}" if len(stages) > 1 else "each GPU"
        over = "  OUT OF MEMORY" if stage.peak > request.gpu_bytes else ""
        table.add_row(name, *(_gib(getattr(stage, n)) for n in names), _gib(stage.peak) + over + mark)
    return table


def _steps_table(plan: Plan) -> Table:
    heads = ("step of", "examples", "tokens", "micro-batches", "PFLOP", "computed", "idle", "seconds")
    table = Table(*heads, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for step in plan.steps:
        flops = (f"{step.model_flops / 1e15:.1f}", f"{step.computed_flops / 1e15:.1f}")
        counts = (str(step.examples), str(step.tokens), str(step.micro_batches))
        table.add_row(step.name, *counts, *flops, f"{step.idle:.1%}", f"{step.seconds:.1f}")
    return table


def _round(plan: Plan) -> list[str]:
    request, r = plan.request, plan.round
    engine = request.engines[-1]
    engines = f"{engine.count} x tp {engine.tp} ({engine.kind})"
    lines = [
        f"per 1,000 questions: {1000 * request.traces} traces sampled in {_duration(r.trace_seconds)} at "
        f"{r.engine_tokens_per_second:.0f} tokens/s on engines {engines}; scored in "
        f"{_duration(r.scoring_seconds)}"
    ]
    if request.answers:
        lines[0] += f"; {request.answers} answers after each in {_duration(r.answer_seconds)}"
    lines.append(
        f"weights to the engines: {r.sync_bytes / 1e9:.1f} GB, by way of a disk {_duration(r.disk_sync_seconds)}"
    )
    return lines


def _assumptions(request: Request) -> list[str]:
    item = request.operators.item
    share = "stay on these GPUs" if request.shares_gpus else "are elsewhere"
    lines = [
        "assumed, not measured:",
        f"  examples of {request.mean} tokens on average, {request.longest} at most; sampled answers of "
        f"{request.answer_tokens}; routing even over experts",
        f"  peak {work.PEAK_FLOPS[item] / 1e12:.0f} TFLOP/s and {work.MEMORY_BANDWIDTH / 1e12:.2f} TB/s per GPU (H100 "
        f"SXM); training reaches {work.TRAINING_EFFICIENCY:.0%} of it, scoring {work.SCORING_EFFICIENCY:.0%}, decoding "
        f"{work.DECODE_EFFICIENCY:.0%} of the bandwidth; disk {work.DISK_BANDWIDTH / 1e9:.0f} GB/s",
        f"  reserve: {_gib(memory.CUDA_RESERVE)} GiB for CUDA context and NCCL, {memory.FRAGMENTATION:.0%} of "
        "activations for fragmentation",
        f"  engines {share} while the trainer works",
    ]
    if request.operators.fp8:
        lines.insert(-1, "  FP8: activations and times are counted as in bfloat16")
    if any(
        engine.shares_gpus and engine.kind == "sglang" and not (engine.kv_tokens or engine.memory_fraction)
        for engine in request.engines
    ):
        lines[-1] += f", with {SERVER_FRACTION:.0%} of the memory (rollout.servers.memory_fraction sets it)"
    return lines


def _worst_stage(plan: Plan, kind: str) -> str:
    stages = {"training": plan.training, "scoring": plan.scoring}.get(kind, ())
    return f" on stage {worst(stages)}" if len(stages) > 1 else ""


def _report(plan: Plan) -> dict[str, Any]:
    request = plan.request
    total, active = model_parameters(request.architecture)
    return {
        "fits": plan.fits,
        "gpu_bytes": request.gpu_bytes,
        "peaks": plan.peaks,
        "parameters": total,
        "active_parameters": active,
        "layout": {
            **asdict(request.layout),
            "dp": request.layout.dp,
            "edp": request.layout.edp,
            "places": [asdict(place) for _, place in request.layout.places()],
            "stages": [_stage_holds(request, stage) for stage in range(request.layout.pp)],
        },
        "tokens_per_micro_batch": {"training": request.training_tokens, "scoring": request.scoring_tokens},
        "memory": {
            title: [{**asdict(stage), "peak": stage.peak} for stage in stages]
            for title, stages in _phases(plan).items()
        },
        "steps": [asdict(step) for step in plan.steps],
        "round": asdict(plan.round),
        "assumed": {"mean": request.mean, "longest": request.longest, "answer_tokens": request.answer_tokens},
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
