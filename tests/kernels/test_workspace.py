"""The memory that linear_logprob says it needs, against the goal and against what the CPU path allocates."""

import pytest
import torch
from live_bytes import LiveBytes
from megavar_kernels import linear_logprob, linear_logprob_forward
from megavar_kernels.hidden_grad import HiddenGrad
from megavar_kernels.workspace import workspace_bytes

MIB = 2**20
T, H, V = 32768, 4096, 151_936


def test_recomputing_head_at_32k_tokens_takes_at_most_five_percent_of_its_bf16_logits():
    logits = 2 * T * V
    for fused in (False, True):
        space = workspace_bytes(T, H, V, torch.bfloat16, fused=fused)
        assert space.kept == 0
        assert max(space.forward, space.backward) <= 0.05 * logits


def test_figures_of_the_page():
    """docs/kernels.md, Memory."""
    space = workspace_bytes(T, H, V, torch.bfloat16)
    vectors = 160 * T
    assert space.forward - vectors == 16 * MIB
    assert space.backward - vectors == (256 + 128 + 64 + 16) * MIB
    assert round(100 * space.backward / (2 * T * V), 1) == 4.9
    assert round((workspace_bytes(T, H, V, torch.bfloat16, fused=True).forward - vectors) / MIB) == 74
    assert round(100 * workspace_bytes(T, 5120, V, torch.bfloat16).backward / (2 * T * V), 1) == 5.8
    dropped = workspace_bytes(T, H, V, torch.bfloat16, computed_tokens=T - 1)
    assert round(100 * dropped.backward / (2 * T * V), 1) == 7.6


def test_workspace_does_not_grow_with_the_vocabulary():
    small, large = (workspace_bytes(T, H, rows, torch.bfloat16) for rows in (V, 4 * V))
    assert large.forward == small.forward and large.backward <= small.backward
    kept = workspace_bytes(T, H, V, torch.bfloat16, keep_bytes=1 << 30).kept
    assert 0.99 * 2**30 < kept <= 2**30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", [1500, 1100])
@pytest.mark.parametrize("keep", [0, 300 * 2000 * 4])
def test_cpu_path_stays_within_its_bound(dtype, computed, keep):
    tokens, width, rows = 1500, 64, 2000
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(0, rows, (tokens,), generator=generator)
    target[computed:] = -100
    grads = torch.randn(2, tokens, generator=generator)
    space = workspace_bytes(tokens, width, rows, dtype, keep, computed_tokens=computed, device_type="cpu")
    outputs = 2 * 4 * tokens
    with LiveBytes().ignore(hidden, weight, target) as forward:
        linear_logprob_forward(hidden.detach(), weight.detach(), target)
    assert forward.peak <= space.forward + outputs
    with LiveBytes().ignore(hidden, weight, target, grads) as step:
        results = linear_logprob(hidden, weight, target, keep=keep)
        torch.autograd.backward(results, tuple(grads))
    assert step.peak <= max(space.forward, space.backward) + space.kept + outputs + (
        hidden.grad.nbytes + weight.grad.nbytes
    )
    # the bound is of use: the peak is not far below, and far from whole logits
    assert step.peak >= 0.6 * (space.backward + space.kept)
    assert step.peak < 0.9 * tokens * rows * 4 + space.kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dropped", [[], [0], [99], [0, 5, 6, 50, 99], list(range(1, 80)), list(range(100))])
def test_rounding_and_moving_within_the_accumulator_is_exact(dtype, dropped, monkeypatch):
    monkeypatch.setattr("megavar_kernels.hidden_grad.FIRST_ELEMENTS", 24)
    monkeypatch.setattr("megavar_kernels.hidden_grad.MOVED_ROWS", 7)
    rows = torch.tensor([row for row in range(100) if row not in dropped], dtype=torch.int64)
    hidden = torch.empty(100, 8, dtype=dtype)
    grad = HiddenGrad(hidden, rows, torch.float32, None, False)
    values = torch.randn(len(rows), 8)
    grad.accumulator.copy_(values)
    grad.ready(slice(0, len(rows)))
    expected = torch.zeros(100, 8, dtype=dtype)
    expected[rows] = values.to(dtype)
    result = grad.finish()
    assert result.is_contiguous() and torch.equal(result, expected)
