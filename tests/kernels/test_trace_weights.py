"""The torch path of trace_weights against formulas written out in Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megavar_kernels import posterior_score_weights, trace_weights


def oracle(policy, posterior, cu_seqlens, offsets, log_c, temper=1.0, clip=math.inf, length_normalize=True):
    """The five results as lists, one trace and one question at a time."""
    log_ratio, log_rho, weights, bounds, sizes = [], [], [], [], []
    for k, (start, stop) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        total = math.fsum(policy[start:stop]) - math.fsum(posterior[start:stop])
        s = total / (stop - start) if length_normalize and stop > start else total
        log_ratio.append(s)
        log_rho.append(min(max(temper * s, -clip), clip) + log_c[k])
    for first, last in zip(offsets, offsets[1:], strict=False):
        group = log_rho[first:last]
        top = max(group, default=-math.inf)
        if top == -math.inf:
            weights += [0.0] * len(group)
            bounds += [-math.inf] * len(group)
            sizes.append(0.0)
            continue
        rho = [math.exp(value - top) for value in group]
        weights += [value / math.fsum(rho) for value in rho]
        for k in range(1, len(group) + 1):
            highest = max(group[:k])
            if highest == -math.inf:
                bounds.append(-math.inf)
            else:
                total = math.fsum(math.exp(value - highest) for value in group[:k])
                bounds.append(highest + math.log(total / k))
        sizes.append(math.fsum(rho) ** 2 / math.fsum(value**2 for value in rho))
    return log_ratio, log_rho, weights, bounds, sizes


def cumulative(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(st.lists(st.integers(0, 40), max_size=9), max_size=6),
    zero=st.floats(0, 1),
    temper=st.sampled_from([0.0, 0.5, 1.0]),
    clip=st.sampled_from([None, 0.05, 3.0]),
    length_normalize=st.booleans(),
    use_accuracy=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_ragged_groups_match_the_formulas(
    groups, zero, temper, clip, length_normalize, use_accuracy, index, seed
):
    generator = torch.Generator().manual_seed(seed)
    lengths = [length for group in groups for length in group]
    cu_seqlens, offsets = cumulative(lengths), cumulative([len(group) for group in groups])
    policy, posterior = -torch.rand(2, sum(lengths), generator=generator)
    accuracy = torch.randint(1, 9, (len(lengths),), generator=generator) / 8
    accuracy[torch.rand(len(lengths), generator=generator) < zero] = 0
    log_c = [math.log(a) if a > 0 else -math.inf for a in accuracy.tolist()]
    answer = {"accuracy": accuracy} if use_accuracy else {"log_likelihood": torch.tensor(log_c)}
    options = dict(temper=temper, length_normalize=length_normalize)
    result = trace_weights(
        policy.contiguous(), posterior.contiguous(), cu_seqlens.to(index), offsets.to(index),
        clip=clip, **answer, **options,
    )  # fmt: skip
    want = oracle(
        policy.tolist(), posterior.tolist(), cu_seqlens.tolist(), offsets.tolist(), log_c,
        clip=clip or math.inf, **options,
    )  # fmt: skip
    for name, actual, expected in zip(result._fields, result, want, strict=True):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(actual.double(), expected, atol=5e-6, rtol=5e-6, msg=name)


def test_long_traces_keep_fp32_accuracy():
    generator = torch.Generator().manual_seed(0)
    policy = -8 * torch.rand(60_000, generator=generator)
    posterior = -8 * torch.rand(60_000, generator=generator)
    cu_seqlens, offsets = torch.tensor([0, 60_000]), torch.tensor([0, 1])
    result = trace_weights(
        policy, posterior, cu_seqlens, offsets, accuracy=torch.ones(1), length_normalize=False
    )
    exact = math.fsum(policy.tolist()) - math.fsum(posterior.tolist())
    assert abs(result.log_ratio.item() - exact) <= 1e-6 * abs(exact)


def _small():
    generator = torch.Generator().manual_seed(1)
    lengths, sizes = [3, 1, 0, 4, 2, 2, 3], [3, 0, 2, 2]
    policy, posterior = -torch.rand(2, sum(lengths), generator=generator, dtype=torch.float64)
    log_c = -torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    log_c[3:5] = -torch.inf  # the third question has no trace with c > 0
    log_c[0] = -torch.inf
    tensors = [policy.contiguous(), posterior.contiguous(), log_c]
    return tensors, cumulative(lengths), cumulative(sizes)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradcheck(clip):
    (policy, posterior, log_c), cu_seqlens, offsets = _small()
    live = torch.isfinite(log_c)

    def function(policy, posterior, log_c):
        log_c = torch.where(live, log_c, -torch.inf)
        result = trace_weights(
            policy, posterior, cu_seqlens, offsets, log_likelihood=log_c, temper=0.7, clip=clip
        )
        bounds = result.bounds
        return result.log_ratio, result.log_rho[live], bounds[torch.isfinite(bounds)]

    inputs = [policy, posterior, torch.where(live, log_c, 0.0)]
    torch.autograd.gradcheck(function, [value.requires_grad_() for value in inputs])


def test_gradient_of_the_last_bound_is_the_weights():
    """Equation 6: grad L_K = sum_k rho~_k grad log rho_k."""
    (policy, posterior, log_c), cu_seqlens, offsets = _small()
    log_c.requires_grad_()
    policy.requires_grad_()
    result = trace_weights(
        policy, posterior, cu_seqlens, offsets, log_likelihood=log_c, length_normalize=False
    )
    last = torch.tensor([2, 4, 6])
    grad_c, grad_policy = torch.autograd.grad(result.bounds[last].sum(), (log_c, policy))
    torch.testing.assert_close(grad_c, result.weights)
    torch.testing.assert_close(grad_policy, result.weights.repeat_interleave(cu_seqlens.diff()))
    assert not result.weights.requires_grad and not result.effective_sample_size.requires_grad


def test_score_weights_give_the_gradient_of_the_bound_in_the_posterior():
    """Equation A.2 by exact enumeration: two traces drawn from q over three, L_2 = E log mean pi c / q."""
    log_joint = torch.tensor([-1.0, -2.5, -0.3], dtype=torch.float64)
    logits = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    log_q = logits.log_softmax(0)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    probability = log_q[pairs].sum(1).exp()
    rho = (log_joint - log_q).exp()
    exact = torch.autograd.grad((probability * rho[pairs].mean(1).log()).sum(), logits, retain_graph=True)[0]

    flat = pairs.flatten()
    cu_seqlens, offsets = torch.arange(len(flat) + 1), torch.arange(0, len(flat) + 1, 2)
    policy = torch.zeros(len(flat), dtype=torch.float64)
    result = trace_weights(policy, log_q.detach()[flat], cu_seqlens, offsets, log_likelihood=log_joint[flat])
    coefficients = posterior_score_weights(result, offsets) * probability.detach().repeat_interleave(2)
    surrogate = torch.autograd.grad((coefficients * log_q[flat]).sum(), logits)[0]
    torch.testing.assert_close(surrogate, exact, atol=1e-12, rtol=1e-10)


def test_bounds_rise_in_expectation_and_groups_without_mass_are_empty():
    (policy, posterior, _), cu_seqlens, offsets = _small()
    accuracy = torch.zeros(7, dtype=torch.float64)
    result = trace_weights(policy.requires_grad_(), posterior, cu_seqlens, offsets, accuracy=accuracy)
    assert result.weights.eq(0).all() and torch.isneginf(result.bounds).all()
    assert result.effective_sample_size.eq(0).all()
    assert posterior_score_weights(result, offsets).eq(0).all()
    assert torch.autograd.grad(result.bounds.sum(), policy)[0].eq(0).all()
    same = trace_weights(posterior, posterior, cu_seqlens, offsets, accuracy=accuracy + 0.5)
    assert same.effective_sample_size.tolist() == [3.0, 0.0, 2.0, 2.0]
    torch.testing.assert_close(same.bounds, torch.full_like(same.bounds, math.log(0.5)))


INT32 = torch.tensor([0, 2], dtype=torch.int32)
EMPTY = torch.tensor([], dtype=torch.int64)


def _arguments(**change):
    values = dict(
        policy_logprob=torch.zeros(4),
        posterior_logprob=torch.zeros(4),
        cu_seqlens=torch.tensor([0, 1, 4]),
        question_offsets=torch.tensor([0, 2]),
        accuracy=torch.ones(2),
    )
    return {**values, **change}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "policy_logprob: expected dtype", {"policy_logprob": torch.zeros(4).bfloat16()}),
        (TypeError, "posterior_logprob: expected dtype", {"posterior_logprob": torch.zeros(4).double()}),
        (TypeError, "cu_seqlens: expected dtype", {"cu_seqlens": torch.zeros(3)}),
        (TypeError, "question_offsets: expected dtype int64", {"question_offsets": INT32}),
        (ValueError, "posterior_logprob: expected shape", {"posterior_logprob": torch.zeros(3)}),
        (ValueError, "posterior_logprob: must be contiguous", {"posterior_logprob": torch.zeros(8)[::2]}),
        (ValueError, "accuracy: expected shape", {"accuracy": torch.ones(3)}),
        (ValueError, "accuracy: must be between", {"accuracy": torch.tensor([0.5, 1.5])}),
        (ValueError, "accuracy: is on meta", {"accuracy": torch.ones(2, device="meta")}),
        (ValueError, "log_likelihood, accuracy: exactly one", {"log_likelihood": torch.zeros(2)}),
        (ValueError, "log_likelihood, accuracy: exactly one", {"accuracy": None}),
        (ValueError, "cu_seqlens: must ascend from 0 to 4", {"cu_seqlens": torch.tensor([0, 5, 4])}),
        (ValueError, "question_offsets: must ascend from 0 to 2", {"question_offsets": torch.tensor([0, 1])}),
        (ValueError, "question_offsets: needs at least", {"question_offsets": EMPTY}),
        (ValueError, "temper:", {"temper": -1.0}),
        (ValueError, "clip:", {"clip": 0.0}),
    ],
)  # fmt: skip
def test_errors_name_the_argument(error, message, change):
    with pytest.raises(error, match=message):
        trace_weights(**_arguments(**change))


def test_more_than_256_traces_are_an_error():
    with pytest.raises(ValueError, match="question_offsets: a question has 257 traces"):
        trace_weights(
            **_arguments(
                policy_logprob=torch.zeros(0),
                posterior_logprob=torch.zeros(0),
                cu_seqlens=torch.zeros(258, dtype=torch.int64),
                question_offsets=torch.tensor([0, 257]),
                accuracy=torch.ones(257),
            )
        )
