"""Micro-batches and the learning-rate schedule's data order, without process groups."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megavar.config.recipe import Fit, Trainer
from megavar.data.training_set import Example, TrainingSet, write_training_set
from megavar.errors import UserError
from megavar.models.modules import PackedAttention, PackedRows
from megavar.models.parallel_layout import ParallelLayout
from megavar.parallel.groups import Groups
from megavar.phases.fitting import _check_budget
from megavar.trainer.batch import IGNORE, build_micro_batch
from megavar.trainer.fit import global_batch, num_steps
from megavar.trainer.model import Model, Settings

CPU = torch.device("cpu")


def example(name: str, ids: list[int], start: int, weight: float) -> Example:
    return Example(question_id=name, ids=np.array(ids, np.int32), response_start=start, weight=weight)


def test_layout_of_two_examples_with_padding() -> None:
    batch = build_micro_batch(
        [example("a", [5, 6, 7, 8], 2, 0.5), example("b", [9, 4], 1, 2.0)], CPU, multiple_of=3
    )
    assert batch.tokens.tolist() == [[5, 6, 7, 9, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.targets.tolist() == [IGNORE, 7, 8, 4, IGNORE, IGNORE]
    assert batch.weights.tolist() == [0, 0.5, 0.5, 2.0, 0, 0]
    assert batch.rows is not None and batch.rows.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert [(s.start, s.stop) for s in batch.responses] == [(1, 3), (3, 4)]


def test_token_weights_multiply_the_weight_and_may_be_negative() -> None:
    factors = np.array([1.0, 0.25], np.float32)
    first = Example.of("a", np.array([5, 6]), np.array([7, 8]), -2.0, factors)
    batch = build_micro_batch([first, example("b", [9, 4], 1, 2.0)], CPU)
    assert batch.weights.tolist() == [0, -2.0, -0.5, 2.0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("multiple_of", [1, 2, 4])
def test_context_ranks_hold_every_token_once(cp: int, multiple_of: int, packing: bool) -> None:
    """Put together, the parts are each example padded to a multiple of 2 * cp, with the work halved at its middle."""
    rng = np.random.default_rng(cp)
    examples = [
        example(str(n), rng.integers(1, 99, n).tolist(), 1 + n // 3, float(n))
        for n in ((5, 26, 2, 13) if packing else (26,))
    ]
    parts = [
        build_micro_batch(examples, CPU, multiple_of=multiple_of, cp=cp, cp_rank=rank, packing=packing)
        for rank in range(cp)
    ]
    assert len({p.tokens.shape[1] for p in parts}) == 1 and parts[0].tokens.shape[1] % multiple_of == 0
    splits = [p.rows.split for p in parts if p.rows is not None and p.rows.split is not None]
    places = np.concatenate([split.mine for split in splits])
    assert sorted(places) == list(range(len(places)))
    order = splits[0].order.numpy()
    assert np.array_equal(places[order], np.arange(len(places)))

    def whole(name: str) -> np.ndarray:
        return np.concatenate([getattr(p, name).numpy().ravel() for p in parts])[order]

    start = 0
    for e, response in zip(examples, parts[0].responses, strict=True):
        n = len(e.ids) - 1
        assert whole("tokens")[start : start + n].tolist() == e.ids[:-1].tolist()
        assert whole("positions")[start : start + n].tolist() == list(range(n))
        assert (response.start, response.stop) == (start + e.response_start - 1, start + n)
        assert whole("targets")[response].tolist() == e.ids[e.response_start :].tolist()
        start += -(-n // (2 * cp)) * 2 * cp
    predicted = np.zeros(len(places), bool)
    for response in parts[0].responses:
        predicted[response] = True
    assert np.array_equal(whole("targets") != IGNORE, predicted)
    assert np.array_equal(whole("weights") != 0, predicted)
    for split in splits:
        pairs = sum(
            (r.own.stop - r.prefix.start) ** 2 - (r.own.start - r.prefix.start) ** 2 for r in split.runs
        )
        assert pairs * cp == sum((r.own.stop - r.prefix.start) ** 2 - (r.own.start - r.prefix.start) ** 2
                                 for other in splits for r in other.runs)  # fmt: skip


@pytest.mark.parametrize(("recipe", "each"), [("tensorwise", 16), ("mxfp8", 32)])
@pytest.mark.parametrize("cp", [1, 2])
def test_under_fp8_every_slice_of_tokens_is_a_multiple(recipe: str, each: int, cp: int) -> None:
    """Also the slices that sequence parallelism makes of a context part, and a micro-batch without examples."""
    groups = Groups(
        layout=ParallelLayout(ranks=2 * cp, tp=2, cp=cp),
        **dict.fromkeys(("rank", "tp_rank", "cp_rank", "dp_rank", "pp_rank", "ep_rank", "etp_rank"), 0),
        device=CPU,
    )
    settings = Settings(sequence_parallel=True, switches={"fp8": "hybrid", "fp8_recipe": recipe})
    unused: Any = None
    model = Model(
        chunks=[], config=unused, architecture=unused, hf_directory=Path(), groups=groups, settings=settings
    )
    for examples in ([], [example("a", [5, 6, 7, 8], 2, 0.5), example("b", [9] * 70, 1, 2.0)]):
        tokens = model.micro_batch(examples).tokens.shape[1]
        assert tokens > 0 and tokens % (2 * each) == 0


def test_an_empty_micro_batch_has_one_ignored_token() -> None:
    batch = build_micro_batch([], CPU)
    assert batch.targets.tolist() == [IGNORE] and batch.weights.tolist() == [0.0]


def test_packed_attention_equals_a_block_diagonal_mask() -> None:
    """Against one masked softmax in float64, values and gradients, for ragged lengths and grouped heads."""
    torch.manual_seed(0)
    lengths = [3, 17, 1, 9, 8, 16]
    t = sum(lengths)
    q, k, v = (torch.randn(t, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    rows = PackedRows.from_lengths(lengths, CPU)
    config = type("Config", (), {"context_parallel_size": 1})()
    got = PackedAttention(config, 1)(q, k, v, packed_seq_params=rows)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (segment[:, None] == segment[None]) & torch.ones(t, t, dtype=torch.bool).tril()
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, keys) / 8**0.5
    probabilities = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", probabilities, values).flatten(1)
    torch.testing.assert_close(got, want)
    seed = torch.randn_like(want)
    for ours, theirs in zip(*(torch.autograd.grad(o, (q, k, v), seed) for o in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
    padded = sum(index.numel() for index, _ in rows.blocks)
    assert padded <= 2 * t, "the padding of a block is bounded by its work"


def test_every_epoch_visits_every_question_once(tmp_path: Path) -> None:
    examples = [example(f"q{i}", [1, 2, 3], 1, 1.0) for i in range(10)]
    write_training_set(tmp_path / "t.arrow", examples)
    training_set = TrainingSet(tmp_path / "t.arrow")
    seen = [e.question_id for step in range(5) for e in global_batch(training_set, step, 4, seed=3)]
    assert set(Counter(seen[:10]).values()) == {1} and set(Counter(seen).values()) == {2}
    assert seen[:10] != seen[10:], "epochs are shuffled differently"
    assert seen[8:12] == [e.question_id for e in global_batch(training_set, 2, 4, seed=3)]


def test_steps_from_epochs() -> None:
    assert num_steps(Fit(questions_per_step=96, epochs=3), 16710) == 523
    assert num_steps(Fit(questions_per_step=96, steps=7), 16710) == 7


@pytest.mark.parametrize(
    ("budget", "cp", "least"), [(10, 1, None), (9, 1, 10), (11, 2, 12), (12, 2, None), (None, 2, None)]
)
def test_a_budget_that_was_asked_for_holds_the_longest_example(
    tmp_path: Path, budget: int | None, cp: int, least: int | None
) -> None:
    """11 tokens, of which the last is no input; a context split pads to a multiple of 2 * cp."""
    ids = np.arange(11, dtype=np.int32)
    write_training_set(tmp_path / "train.arrow", [Example.of("q", ids[:4], ids[4:])])
    trainer = Trainer(ranks=cp, cp=cp, tokens_per_micro_batch=budget)
    if least is None:
        _check_budget(trainer, TrainingSet(tmp_path / "train.arrow"))
        return
    said = (
        f"tokens_per_micro_batch is {budget}: the longest example has 11 tokens; set it to at least {least}"
    )
    with pytest.raises(UserError, match=said):
        _check_budget(trainer, TrainingSet(tmp_path / "train.arrow"))
