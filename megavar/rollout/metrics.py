"""What a stream of completions tells: speed, lengths, truncation, cache hits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from megavar.rollout.engine import Completion

_EDGES = tuple(2**power for power in range(1, 18))


class RolloutMeter:
    """Counters of constant size; the lengths are kept as a histogram over powers of two."""

    def __init__(self) -> None:
        self.completions = self.tokens = self.truncated = self.retries = 0
        self.mixed_versions = 0
        self._lengths = np.zeros(len(_EDGES) + 1, dtype=np.int64)
        self._prompt_tokens = self._cached_tokens = 0
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Generation begins; the clock of tokens per second runs until `stop`."""
        self._started = time.monotonic()

    def stop(self) -> None:
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
            self._started = None

    def observe(self, completion: Completion) -> None:
        self.completions += 1
        self.tokens += len(completion.ids)
        self.truncated += completion.finish_reason == "length"
        self.mixed_versions += len({span.version for span in completion.weight_spans}) > 1
        self._lengths[np.searchsorted(_EDGES, len(completion.ids))] += 1

    def observe_prompt(self, meta: Mapping[str, Any]) -> None:
        """`meta_info` of one SGLang answer."""
        # An answer that was aborted in the queue has no figures.
        self._prompt_tokens += meta.get("prompt_tokens") or 0
        self._cached_tokens += meta.get("cached_tokens") or 0

    def metrics(self) -> dict[str, float | list[int]]:
        """`rollout/length_histogram`[i] counts lengths in (2**i, 2**(i+1)], the first bin from 0."""
        running = time.monotonic() - self._started if self._started is not None else 0.0
        seconds = self._seconds + running
        return {
            "rollout/completions": self.completions,
            "rollout/tokens": self.tokens,
            "rollout/tokens_per_second": self.tokens / seconds if seconds else 0.0,
            "rollout/mean_tokens": self.tokens / self.completions if self.completions else 0.0,
            "rollout/truncation_rate": self.truncated / self.completions if self.completions else 0.0,
            "rollout/mixed_version_rate": self.mixed_versions / self.completions if self.completions else 0.0,
            "rollout/cache_hit_rate": self._cached_tokens / self._prompt_tokens
            if self._prompt_tokens
            else 0.0,
            "rollout/retries": self.retries,
            "rollout/length_histogram": self._lengths.tolist(),
        }
