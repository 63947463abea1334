"""Memory that a phase took at its highest, over all ranks."""

from __future__ import annotations

import torch

from megavar.memory import resident, restart_peak
from megavar.phases.run import largest_over_ranks


class PhaseMemory:
    """Measures from its creation on."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
        restart_peak()
        self._before = resident("VmRSS")

    def metrics(self) -> dict[str, float]:
        """Collective. `perf/peak_cuda_bytes` is what PyTorch's allocator had reserved, on GPUs alone."""
        found = {
            "perf/rss_before_bytes": largest_over_ranks(self._before),
            "perf/peak_rss_bytes": largest_over_ranks(resident("VmHWM")),
        }
        if self._cuda:
            found["perf/peak_cuda_bytes"] = largest_over_ranks(torch.cuda.max_memory_reserved())
        return found
