"""The torch path of linear_logprob against textbook fp64 formulas on full logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import child_environment, gradients, logprob_and_entropy, within_ulp
from megavar_kernels import linear_logprob, linear_logprob_forward, linear_logprob_forward_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def problem(tokens, width, rows, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(rows, width, generator=generator).mul(width**-0.5).to(dtype)
    target = torch.randint(0, rows, (tokens,), generator=generator)
    grads = torch.randn(2, tokens, generator=generator)
    return hidden, weight, target, grads[0].contiguous(), grads[1].contiguous()


def backward(hidden, weight, target, grad_logprob, grad_entropy, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob, entropy = linear_logprob(hidden, weight, target, **options)
    loss = (logprob * grad_logprob).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy).sum()
    loss.backward()
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 600),
    width=st.integers(1, 6).map(lambda n: 8 * n),
    rows=st.integers(1, 300),
    padding=st.integers(0, 9),
    temperature=st.floats(0.3, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_outputs_match_fp64(tokens, width, rows, padding, temperature, dtype, index, seed):
    hidden, weight, target, _, _ = problem(tokens, width, rows + padding, dtype, seed)
    target = (target % rows).to(index)
    target[::7] = -100
    options = dict(temperature=temperature, vocab_size=rows)
    expected = logprob_and_entropy(hidden, weight, target, **options)
    for actual in (
        linear_logprob(hidden, weight, target, **options),
        linear_logprob_forward(hidden, weight, target, **options),
    ):
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == torch.float32 and got.shape == (tokens,)
            torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-6)
    alone, nothing = linear_logprob(hidden, weight, target, entropy=False, **options)
    torch.testing.assert_close(alone.double(), expected[0], atol=2e-6, rtol=1e-6)
    assert nothing.shape == (tokens,) and not nothing.any()


@pytest.mark.parametrize("keep", ["none", 300 * 131 * 4])
def test_without_entropy_the_gradients_are_the_same(keep):
    hidden, weight, target, g_lp, _ = problem(600, 24, 131)
    with_it, without = (
        backward(hidden, weight, target, g_lp, None, keep=keep, entropy=entropy) for entropy in (True, False)
    )
    for got, want in zip(without, with_it, strict=True):
        if want is not with_it[1]:
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    leaf = hidden.clone().requires_grad_()
    assert not linear_logprob(leaf, weight, target, entropy=False)[1].requires_grad


@pytest.mark.parametrize("offset", [-300.0, -80.0, -50.0, 0.0, 50.0, 87.0, 300.0])
def test_logits_far_from_zero_without_entropy(offset):
    """Beyond what fp32 exponentials hold, for some tokens or all, and where the log of their sum is far from 0."""
    hidden, weight, target, _, _ = problem(40, 16, 70)
    weight[:, 0], hidden[:, 0] = 1.0, offset
    hidden[:20, 0] = 0.0
    expected, _ = logprob_and_entropy(hidden, weight, target)
    got, _ = linear_logprob(hidden, weight, target, entropy=False)
    torch.testing.assert_close(got.double(), expected, atol=1e-6 * max(abs(offset), 2), rtol=1e-6)


@pytest.mark.parametrize("keep", ["auto", "none", 300 * 131 * 4, 1 << 40])
def test_fp32_gradients_match_fp64(keep):
    hidden, weight, target, g_lp, g_en = problem(700, 24, 131)
    target[5], g_lp[9], g_en[9] = -100, 0.0, 0.0
    for entropy_grad in (g_en, None):
        dx, dw = backward(hidden, weight, target, g_lp, entropy_grad, temperature=0.7, keep=keep)[2:]
        want_dx, want_dw = gradients(hidden, weight, target, g_lp, entropy_grad, temperature=0.7)
        torch.testing.assert_close(dx.double(), want_dx, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(dw.double(), want_dw, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_rounded_once(dtype):
    hidden, weight, target, g_lp, g_en = problem(300, 32, 101, dtype)
    dx, dw = backward(hidden, weight, target, g_lp, g_en)[2:]
    want_dx, want_dw = gradients(hidden, weight, target, g_lp, g_en)
    assert dx.dtype == dw.dtype == dtype
    assert within_ulp(dx, want_dx, floor=1e-6) and within_ulp(dw, want_dw, floor=1e-5)


def test_gradcheck():
    hidden, weight, target, _, _ = problem(5, 8, 11)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    target[2] = -100

    def function(x, w):
        return linear_logprob(x, w, target.clamp(max=8), temperature=1.3, vocab_size=9)

    # The first backward pass uses kept exponentials and lets them go, a second one computes them again.
    torch.autograd.gradcheck(function, (hidden, weight), nondet_tol=1e-12)


def test_one_pass_matches_autograd_and_adds_into_the_accumulator():
    hidden, weight, target, g_lp, g_en = problem(530, 16, 67, torch.bfloat16)
    target[3], g_lp[4], g_en[4] = -100, 0.0, 0.0
    logprob, entropy, dx, dw = backward(hidden, weight.float().to(torch.bfloat16), target, g_lp, g_en)
    total = torch.ones(67, 16)
    once = linear_logprob_forward_backward(hidden, weight, target, g_lp, g_en, weight_grad=total)
    computed = torch.arange(530) != 4
    torch.testing.assert_close(once[0][computed], logprob[computed])
    torch.testing.assert_close(once[1][computed], entropy[computed])
    assert once[0][4] == 0 and once[1][4] == 0
    torch.testing.assert_close(once[2], dx)
    assert once[3] is total and within_ulp(dw, total.double() - 1, floor=1e-5)


def test_frozen_inputs_and_unused_outputs_get_no_gradient():
    hidden, weight, target, g_lp, _ = problem(20, 8, 30)
    for frozen in (hidden, weight):
        inputs = [t if t is frozen else t.clone().requires_grad_() for t in (hidden, weight)]
        linear_logprob(*inputs, target)[0].backward(g_lp)
        want = gradients(hidden, weight, target, g_lp)
        for tensor, expected in zip(inputs, want, strict=True):
            assert (tensor.grad is None) == (tensor is frozen)
            if tensor is not frozen:
                torch.testing.assert_close(tensor.grad.double(), expected, atol=1e-6, rtol=1e-5)
    hidden.requires_grad_()
    linear_logprob(hidden, weight, target)[1].sum().backward()
    want = gradients(hidden, weight, target, torch.zeros(20), torch.ones(20))[0]
    torch.testing.assert_close(hidden.grad.double(), want, atol=1e-6, rtol=1e-5)


def test_retained_graph_gives_the_same_gradient_twice():
    hidden, weight, target, g_lp, _ = problem(300, 8, 40)
    hidden.requires_grad_()
    logprob, _ = linear_logprob(hidden, weight, target, keep=1 << 40)
    first = torch.autograd.grad(logprob, hidden, g_lp, retain_graph=True)[0]
    # kept exponentials, then computed ones
    torch.testing.assert_close(torch.autograd.grad(logprob, hidden, g_lp)[0], first, rtol=1e-5, atol=1e-7)


def test_no_tokens_and_only_ignored_tokens():
    hidden, weight, _, _, _ = problem(4, 8, 10)
    for x, target in ((hidden[:0], torch.zeros(0, dtype=torch.int64)), (hidden, torch.full((4,), -100))):
        grads = torch.ones(len(target))
        logprob, entropy, dx, dw = backward(x, weight, target, grads, grads)
        assert logprob.shape == entropy.shape == target.shape
        assert not logprob.any() and not entropy.any() and not dx.any() and not dw.any()
        assert not linear_logprob_forward_backward(x, weight, target, grads)[3].any()


def test_extreme_logits_stay_finite():
    hidden = torch.full((2, 8), 200.0)
    weight = torch.cat([torch.full((1, 8), 100.0), torch.full((1, 8), -100.0), torch.full((1, 8), 99.0)])
    target = torch.tensor([0, 1])
    logprob, entropy, dx, dw = backward(hidden, weight, target, torch.ones(2), torch.ones(2))
    assert logprob.tolist() == [0.0, -320000.0] and entropy.tolist() == [0.0, 0.0]
    assert dx.isfinite().all() and dw.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_logits_are_never_whole():
    hidden, weight, target, g_lp, g_en = problem(1024, 8, 1000)
    with LargestTensor() as largest:
        backward(hidden, weight, target, g_lp, g_en)
    assert largest.elements <= 256 * 1000


def test_rows_without_gradient_are_left_out_of_the_backward_gemms():
    hidden, weight, target, g_lp, _ = problem(1024, 8, 1000)
    g_lp[10:] = 0
    hidden.requires_grad_()
    logprob, _ = linear_logprob(hidden, weight, target, keep="none")
    with LargestTensor() as largest:
        logprob.backward(g_lp)
    assert largest.elements <= 10 * 1000
    assert hidden.grad[:10].any() and not hidden.grad[10:].any()


def test_the_documented_example_runs():
    page = Path(__file__).parents[2] / "docs/kernels.md"
    example = page.read_text().split("```python\n")[1].split("```")[0]
    hidden, weight, target, token_weight, _ = problem(6, 8, 10)
    lm_head = torch.nn.Linear(8, 10, bias=False)
    with torch.no_grad():
        lm_head.weight.copy_(weight)
    names = dict(hidden=hidden, lm_head=lm_head, target=target, token_weight=token_weight, normalizer=6.0)
    exec(example, names)
    want = gradients(hidden, weight, target, -token_weight / 6)[1]
    torch.testing.assert_close(lm_head.weight.grad.double(), want, atol=1e-6, rtol=1e-5)


GOOD = dict(zip(("hidden", "weight", "target"), problem(6, 8, 10)[:3], strict=True))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "hidden: expected dtype", {"hidden": torch.zeros(6, 8, dtype=torch.int32)}),
        (TypeError, "weight: dtype", {"weight": torch.zeros(10, 8, dtype=torch.bfloat16)}),
        (TypeError, "target: expected dtype", {"target": torch.zeros(6)}),
        (ValueError, "hidden: expected 2 dimensions", {"hidden": torch.zeros(1, 6, 8)}),
        (ValueError, "hidden: must be contiguous", {"hidden": torch.zeros(8, 6).t()}),
        (ValueError, "weight: must be contiguous", {"weight": torch.zeros(8, 10).t()}),
        (ValueError, "weight: 16 columns", {"weight": torch.zeros(10, 16)}),
        (ValueError, "weight: is on meta", {"weight": torch.zeros(10, 8, device="meta")}),
        (ValueError, "hidden: hidden size 6", {"hidden": torch.zeros(6, 6), "weight": torch.zeros(10, 6)}),
        (ValueError, r"target: expected shape \[6\]", {"target": torch.zeros(5, dtype=torch.int64)}),
        (ValueError, "target: 1 ids .* first is 10", {"target": torch.tensor([0, 1, 10, 2, 3, 4])}),
        (ValueError, "target: 1 ids .* first is -1", {"target": torch.tensor([0, 1, -1, 2, 3, 4])}),
        (ValueError, "temperature:", {"temperature": 0.0}),
        (ValueError, "vocab_start:", {"vocab_start": -1}),
        (ValueError, "vocab_size:", {"vocab_size": 0}),
        (ValueError, "group:", {"sequence_parallel": True}),
        (ValueError, "keep:", {"keep": "all"}),
    ],
)
def test_errors_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        linear_logprob(**{**GOOD, **change})


def test_one_pass_errors_name_the_argument():
    with pytest.raises(TypeError, match="grad_logprob: expected dtype float32"):
        linear_logprob_forward_backward(**GOOD, grad_logprob=torch.zeros(6, dtype=torch.float16))
    with pytest.raises(ValueError, match="weight_grad: expected torch.float32"):
        linear_logprob_forward_backward(
            **GOOD, grad_logprob=torch.zeros(6), weight_grad=torch.zeros(10, 8, dtype=torch.float64)
        )


def test_triton_is_needed_for_devices_alone():
    code = """
import sys
sys.modules["triton"] = None
import torch
from megavar_kernels import linear_logprob, trace_weights
linear_logprob(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64))
def message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except RuntimeError as error:
        return str(error)
zeros = dict(device="meta")
offsets = torch.zeros(1, dtype=torch.int64, **zeros)
index = torch.zeros(2, dtype=torch.int64, **zeros)
print(message(linear_logprob, torch.zeros(2, 8, **zeros), torch.zeros(3, 8, **zeros), index))
empty = torch.zeros(0, **zeros)
print(message(trace_weights, empty, empty, offsets, offsets, accuracy=empty))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment()
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "hidden: is on meta, which needs the triton package",
        "policy_logprob: is on meta, which needs the triton package",
    ]
