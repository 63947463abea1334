"""Intervals against published quantiles and coverage, pass@k against enumeration of subsets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavar.evaluate.statistics import (
    accuracy,
    majority_vote,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(("questions", "quantile"), [(4, 3.18245), (11, 2.22814), (121, 1.97993)])
def test_interval_takes_students_t_with_one_question_less(questions, quantile):
    """Quantiles of any table, at 0.975 with questions - 1 degrees of freedom."""
    means = [0.4 + 0.2 * (i % 2) for i in range(questions)]
    result = accuracy([[m, m] for m in means])
    deviation = (sum((m - sum(means) / questions) ** 2 for m in means) / (questions - 1)) ** 0.5
    half = quantile * deviation / questions**0.5
    assert result.high - result.mean == pytest.approx(half, rel=1e-5)
    assert result.mean - result.low == pytest.approx(half, rel=1e-5)


def test_wilson_against_a_worked_example():
    # 8 of 10 at 95%: (0.4902, 0.9433), as in any text.
    assert wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.27754), abs=2e-5)
    assert wilson_interval(1.0, 10) == pytest.approx((0.72246, 1.0), abs=2e-5)


def test_one_sample_per_question_is_wilson():
    out = accuracy([[1.0]] * 8 + [[0.0]] * 2)
    assert (out.mean, out.low, out.high) == pytest.approx((0.8, 0.49016, 0.94332), abs=2e-5)
    assert (out.questions, out.samples) == (10, 10)


def test_samples_of_a_question_are_one_observation():
    """Copying every sample adds no information; the interval must not shrink."""
    rng = np.random.default_rng(0)
    rows = [rng.random(4) < p for p in rng.random(50)]
    once, copied = accuracy(rows), accuracy([np.repeat(row, 8) for row in rows])
    assert (once.low, once.high) == pytest.approx((copied.low, copied.high))
    means = np.array([row.mean() for row in rows])
    half = 2.00958 * means.std(ddof=1) / np.sqrt(50)
    assert once.high - once.mean == pytest.approx(half, rel=1e-5)


def test_uneven_samples_weigh_questions_alike():
    out = accuracy([[1, 1, 1, 1, 1, 1, 1, 1], [0]])
    assert out.mean == 0.5
    assert out.samples == 9


def test_certainty_keeps_a_width():
    for value in (0, 1):
        out = accuracy([[value] * 8] * 20)
        low, high = wilson_interval(value, 20)
        assert (out.low, out.high) == (low, high)
        assert out.high - out.low > 0.1
    single = accuracy([[1, 0, 1, 1]])
    assert single.low < 0.2 and single.high == pytest.approx(0.99, abs=0.02)


def test_coverage_of_the_interval():
    """Questions of mixed difficulty, 4 samples each: 95% intervals hold the mean in 95% of the draws."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        difficulty = rng.beta(0.7, 0.7, size=40)
        out = accuracy(list(rng.random((40, 4)) < difficulty[:, None]))
        hits += out.low <= 0.5 <= out.high
    assert 925 <= hits <= 975


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=8), st.floats(0.5, 0.999)
)
def test_interval_holds_the_mean_and_stays_in_range(scores, confidence):
    out = accuracy(scores, confidence=confidence)
    assert 0 <= out.low <= out.mean + 1e-12 and out.mean - 1e-12 <= out.high <= 1
    assert accuracy(scores[::-1], confidence=confidence).low == pytest.approx(out.low)


def test_pass_at_k_is_the_chance_of_a_subset():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c > n:
            continue
        outcomes = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            expected = sum(any(s) for s in subsets) / len(subsets)
            assert pass_at_k([n], [c], k).tolist() == pytest.approx([expected])
    assert pass_at_k([1000, 1000], [1, 0], 10).tolist() == pytest.approx([0.01, 0])


def test_majority_vote():
    assert majority_vote(["4", "5", "4"], [1, 0, 1]) == 1
    assert majority_vote(["5", "4"], [0, 1]) == 0  # a tie goes to the answer seen first
    assert majority_vote([None, None, "4"], [0, 0, 1]) == 1
    assert majority_vote([None], [0]) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: accuracy([]),
        lambda: accuracy([[1], []]),
        lambda: accuracy([[1.5]]),
        lambda: accuracy([[float("nan")]]),
        lambda: accuracy([[1]], confidence=1.0),
        lambda: pass_at_k([4], [5], 1),
        lambda: pass_at_k([4], [1], 5),
        lambda: pass_at_k([4, 4], [1], 1),
        lambda: majority_vote(["4"], [1, 0]),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
