"""Which examples share a micro-batch: a pure function of lengths, so that every rank computes the same plan."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

MicroBatches = list[list[int]]
"""Example indices of each micro-batch of one data-parallel rank."""


def plan_micro_batches(
    lengths: Sequence[int], *, budget: int, ranks: int, packing: bool = True
) -> list[MicroBatches]:
    """Spread examples over data-parallel ranks and micro-batches of at most `budget` tokens, evenly loaded.

    Longest first, each into the least loaded micro-batch (LPT): every rank gets the same number of micro-batches,
    as collective operations across ranks need, and nearly the same number of tokens. A micro-batch is empty only
    where there are fewer examples than micro-batches. Without packing each holds one example.

    Raises:
        ValueError: an example is longer than the budget.
    """
    if lengths and max(lengths) > budget:
        raise ValueError(
            f"an example of {max(lengths)} tokens exceeds the micro-batch budget of {budget} tokens"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-len(lengths) // ranks) if not packing else max(1, -(-sum(lengths) // (budget * ranks)))
    while True:
        bins = _fill(order, lengths, bins=count * ranks, budget=budget, one_each=not packing)
        if bins is not None:
            return [bins[rank::ranks] for rank in range(ranks)]
        count += 1


def _fill(
    order: Sequence[int], lengths: Sequence[int], *, bins: int, budget: int, one_each: bool
) -> list[list[int]] | None:
    members: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, b) for b in range(bins)]
    heapq.heapify(heap)
    for index in order:
        load, b = heapq.heappop(heap)
        # The least loaded bin is the roomiest: when it is too full, all are.
        if load + lengths[index] > budget:
            return None
        members[b].append(index)
        if not one_each:
            heapq.heappush(heap, (load + lengths[index], b))
    return members
