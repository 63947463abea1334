"""Timing and reporting shared by the benchmarks. Times need a CUDA device."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton


def require_device(program: str) -> None:
    """Exit with 2 and one line where there is no CUDA device."""
    if not torch.cuda.is_available():
        print(f"{program}: needs a CUDA device, none is available", file=sys.stderr)
        raise SystemExit(2)


def milliseconds(function: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Median device time of one call."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def peak_mib(function: Callable[[], object]) -> float:
    """Most memory that one call holds beyond what was allocated before it, MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def save(path: Path, rows: list[dict], **versions: object) -> None:
    """Write rows with the device and versions they were measured on, and further `versions`."""
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        **versions,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {path}")
