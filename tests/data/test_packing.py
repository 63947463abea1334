"""Micro-batch plans: a partition of the examples, within budget, alike for every rank."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavar.data.packing import plan_micro_batches


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=60),
    slack=st.integers(0, 200),
    ranks=st.integers(1, 8),
    packing=st.booleans(),
)
def test_plan_is_a_partition_within_the_budget(lengths: list[int], slack: int, ranks: int, packing: bool) -> None:
    budget = max(lengths, default=1) + slack
    plan = plan_micro_batches(lengths, budget=budget, ranks=ranks, packing=packing)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1, "ranks must take part in the same number of micro-batches"
    bins = [b for rank in plan for b in rank]
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)
    if not packing:
        assert all(len(b) <= 1 for b in bins)
    elif lengths:
        # Longest-first filling needs at most twice the bins that any filling needs, rounded up to full ranks.
        assert len(bins) <= ranks * max(1, -(-2 * sum(lengths) // (budget * ranks)) + 1)


def test_ranks_are_evenly_loaded() -> None:
    lengths = [1000, 10, 900, 20, 800, 30, 700, 40, 600, 50, 500, 60]
    loads = [sum(lengths[i] for b in rank for i in b) for rank in plan_micro_batches(lengths, budget=2600, ranks=2)]
    assert max(loads) / min(loads) < 1.05


def test_an_example_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="11 tokens exceeds .* 10"):
        plan_micro_batches([3, 11], budget=10, ranks=2)
