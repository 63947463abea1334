"""The Triton path of trace_weights under the interpreter against the fp64 reference."""

import importlib

import interpreter_shim  # noqa: F401
import pytest
import torch
from megavar_kernels import trace_weights, trace_weights_triton

front = importlib.import_module("megavar_kernels.trace_weights")  # the package attribute is the function

# ragged traces (none, one and several blocks of tokens) in questions of 0, 3, 1, 0 and 4 traces
LENGTHS = torch.tensor([3, 0, 2500, 7, 1024, 1, 1025, 4])
OFFSETS = torch.tensor([0, 0, 3, 4, 4, 8])
ACCURACY = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.25, 0.125, 0.0, 1.0])
LOG_LIKELIHOOD = torch.tensor([-3.0, -500.0, -2.0, -torch.inf, -1.0, -40.0, -torch.inf, -0.5])


def run(dtype, index, answers):
    generator = torch.Generator().manual_seed(0)
    total = int(LENGTHS.sum())
    policy, posterior = (-torch.rand(2, total, generator=generator)).to(dtype).unbind(0)
    policy, posterior = policy.clone().requires_grad_(), posterior.clone().requires_grad_()
    answers = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in answers.items()}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)]).to(index)
    result = trace_weights(policy, posterior, cu_seqlens, OFFSETS.to(index), **answers)
    upstream = torch.randn(3, 8, generator=generator).to(dtype).unbind(0)
    grads = torch.autograd.grad(
        [result.log_ratio, result.log_rho, result.bounds], [policy, posterior], upstream
    )
    return [*result, *grads]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "answers",
    [
        {"accuracy": ACCURACY},
        {"log_likelihood": LOG_LIKELIHOOD, "temper": 0.5, "clip": 0.1},
        {"log_likelihood": LOG_LIKELIHOOD, "length_normalize": False},
        {"accuracy": ACCURACY, "temper": 0.0},
    ],
)
def test_kernels_match_the_fp64_reference(monkeypatch, index, answers):
    expected = run(torch.float64, index, answers)
    monkeypatch.setattr(front, "_backend", lambda logprob: trace_weights_triton)
    for actual, want in zip(run(torch.float32, index, answers), expected, strict=True):
        torch.testing.assert_close(actual.double(), want, atol=1e-5, rtol=1e-5)


def test_a_group_of_256_traces(monkeypatch):
    monkeypatch.setattr(front, "_backend", lambda logprob: trace_weights_triton)
    offsets = torch.tensor([0, 256])
    log_c = torch.linspace(-2000, 0, 256)
    zeros = torch.zeros(256)
    result = trace_weights(zeros, zeros, torch.arange(257), offsets, log_likelihood=log_c)
    torch.testing.assert_close(result.weights, log_c.double().softmax(0).float(), atol=1e-6, rtol=1e-5)
    want = log_c.double().logcumsumexp(0) - torch.arange(1, 257).double().log()
    torch.testing.assert_close(result.bounds.double(), want, atol=0, rtol=1e-6)


def test_no_traces_and_no_questions(monkeypatch):
    monkeypatch.setattr(front, "_backend", lambda logprob: trace_weights_triton)
    empty, zero = torch.zeros(0), torch.zeros(1, dtype=torch.int32)
    for offsets in (zero, torch.zeros(3, dtype=torch.int32)):
        result = trace_weights(empty, empty, zero, offsets, accuracy=empty)
        assert result.weights.shape == (0,)
        assert result.effective_sample_size.tolist() == [0.0] * (len(offsets) - 1)
