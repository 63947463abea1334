"""Every identity of the method (arXiv 2509.22637, sections 2-3, Appendix A), by exact enumeration in float64.

The package's functions are evaluated inside the sums; the other side of each equation is autograd or a sum
written out here. `conftest.toy` is one question; all thoughts, answers and K-tuples of them are enumerated.
"""

from __future__ import annotations

import itertools
import math

import megavar_kernels as kernels
import pytest
import torch
from torch import Tensor

from megavar.objectives.baselines import question_multiplied, rft_weights
from megavar.objectives.estimators import log_accuracy, log_gml, log_likelihood, share_over_answers
from megavar.objectives.posterior import forward_kl_weights
from megavar.objectives.weights import ScoredTraces, TraceWeights, weigh

THOUGHTS = ANSWERS = 7


def assert_equal(a: Tensor | float, b: Tensor | float) -> None:
    """Float64 on both sides, and a residual below 1e-10, relative where the values are small."""
    for value in (a, b):
        assert not isinstance(value, Tensor) or value.dtype == torch.float64
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    residual = (a - b).abs().max().item()
    assert residual < 1e-10 * min(b.abs().max().item(), 1.0) + 1e-15, f"residual {residual:.3e}"


def grad(value: Tensor, *tables: Tensor) -> Tensor:
    """d value / d tables, flat; zero for tables that value does not depend on."""
    parts = torch.autograd.grad(value, tables, retain_graph=True, allow_unused=True)
    return torch.cat(
        [t.new_zeros(t.numel()) if p is None else p.flatten() for p, t in zip(parts, tables, strict=True)]
    )


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def tuples(size: int, length: int) -> Tensor:
    """All [size^length, length] tuples of indices."""
    return torch.tensor(list(itertools.product(range(size), repeat=length)))


def offsets(questions: int, traces: int) -> Tensor:
    return torch.arange(questions + 1) * traces


def ids(questions: int) -> tuple[str, ...]:
    return tuple(f"tuple {i}" for i in range(questions))


def ragged(per_sequence: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """Token log-probs of the sequences `index` names, end to end, with their offsets."""
    lengths = torch.tensor([per_sequence[i].numel() for i in index.flatten().tolist()])
    tokens = torch.cat([per_sequence[i] for i in index.flatten().tolist()])
    return tokens, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def weigh_tuples(
    space, toy, index: Tensor, proposal: Tensor | None = None, ratio: str = "full"
) -> TraceWeights:
    """The package's weights of all K-tuples at once: each tuple is a question with K traces."""
    policy, cu_seqlens = ragged(space.token_logprobs(toy.thought.detach()), index)
    proposal = toy.posterior.detach() if proposal is None else proposal
    posterior, _ = ragged(space.token_logprobs(proposal), index)
    scored = ScoredTraces(
        question_ids=ids(index.shape[0]),
        question_offsets=offsets(*index.shape),
        log_c=toy.log_c.detach()[index].flatten(),
        policy_logprobs=policy,
        posterior_logprobs=posterior,
        cu_seqlens=cu_seqlens,
    )
    return weigh(scored, ratio=ratio)


def kernel_bounds(space, toy, index: Tensor) -> kernels.TraceWeights:
    """The kernel itself on all K-tuples, with its own gradients."""
    policy, cu_seqlens = ragged(space.token_logprobs(toy.thought), index)
    posterior, _ = ragged(space.token_logprobs(toy.posterior.detach()), index)
    log_c = toy.log_c[index].flatten()
    where = offsets(*index.shape)
    return kernels.trace_weights(
        policy, posterior, cu_seqlens, where, log_likelihood=log_c, length_normalize=False
    )


def test_tables_are_distributions_from_easy_to_hopeless(toy):
    assert_equal(toy.log_pi.exp().sum(), 1)
    assert_equal(toy.log_q.exp().sum(), 1)
    assert_equal(toy.log_answer.exp().sum(dim=1), 1)
    assert_equal(toy.log_true_posterior.exp().sum(), 1)
    low, high = {"easy": (0.7, 0.9), "medium": (0.2, 0.5), "hard": (0.05, 0.15), "hopeless": (0, 1e-4)}[
        toy.name
    ]
    assert low < toy.log_evidence.exp() < high


# Bounds


def test_elbo_falls_short_by_the_kl_to_the_true_posterior(space, toy):
    """Eq. 2 and 4; the single-trace bound L_1 is the ELBO."""
    q, one = toy.log_q.exp(), tuples(THOUGHTS, 1)
    elbo = (q * weigh_tuples(space, toy, one).bounds).sum()
    assert_equal(elbo, (q * toy.log_c).sum() - kl(toy.log_q, toy.log_pi))
    assert_equal(elbo, toy.log_evidence - kl(toy.log_q, toy.log_true_posterior))
    assert elbo < toy.log_evidence - 1e-3


def test_elbo_is_tight_at_the_true_posterior(space, toy):
    best = space.table_of(toy.log_true_posterior.detach())
    assert_equal(space.sequence_logprobs(best), toy.log_true_posterior)
    bounds = weigh_tuples(space, toy, tuples(THOUGHTS, 1), best).bounds
    assert_equal(bounds, toy.log_evidence.expand(THOUGHTS))
    assert_equal(
        grad(kl(space.sequence_logprobs(best.requires_grad_()), toy.log_true_posterior.detach()), best), 0
    )


def test_bounds_rise_with_the_number_of_traces(space, toy):
    """Eq. 5: L_1 <= L_2 <= L_3 <= log P; the prefix bounds of a triple are unbiased for each of them."""
    triples = tuples(THOUGHTS, 3)
    probability = toy.log_q[triples].sum(dim=1).exp()
    prefix = weigh_tuples(space, toy, triples).bounds.view(-1, 3)
    bounds = (probability[:, None] * prefix).sum(dim=0)
    log_rho = toy.log_pi + toy.log_c - toy.log_q
    for k in (1, 2, 3):
        index = tuples(THOUGHTS, k)
        brute = (toy.log_q[index].sum(1).exp() * log_rho[index].exp().mean(dim=1).log()).sum()
        assert_equal(bounds[k - 1], brute)
    assert bounds[0] < bounds[1] < bounds[2] < toy.log_evidence


# Gradients of the bound


@pytest.mark.parametrize("traces", [1, 2, 3])
def test_policy_gradient_of_the_bound_is_the_weighted_log_likelihood(space, toy, traces):
    """Eq. 6, with grad log pi(z, Y|x) = grad log pi(z|x) + grad log c(z)."""
    index = tuples(THOUGHTS, traces)
    probability = toy.log_q.detach()[index].sum(dim=1).exp()
    joint = toy.log_pi + toy.log_c
    bound = (probability * ((joint - toy.log_q.detach())[index].logsumexp(dim=1) - math.log(traces))).sum()
    weights = weigh_tuples(space, toy, index).weights.view(-1, traces)
    estimator = (probability * (weights * joint[index]).sum(dim=1)).sum()
    exact = grad(bound, toy.thought, toy.answer)
    assert_equal(grad(estimator, toy.thought, toy.answer), exact)
    differentiable = kernel_bounds(space, toy, index).bounds.view(-1, traces)[:, -1]
    assert_equal((probability * differentiable).sum(), bound)
    assert_equal(grad((probability * differentiable).sum(), toy.thought, toy.answer), exact)


@pytest.mark.parametrize("traces", [1, 2, 3])
def test_posterior_gradient_of_the_bound(space, toy, traces):
    """A.2: the score-function form, E[sum_k (log mean rho - rho~_k) grad log q(z_k)]."""
    index = tuples(THOUGHTS, traces)
    log_rho = (toy.log_pi + toy.log_c).detach() - toy.log_q
    bound = (toy.log_q[index].sum(1).exp() * (log_rho[index].logsumexp(dim=1) - math.log(traces))).sum()
    out = weigh_tuples(space, toy, index)
    coefficient = out.bounds.view(-1, traces)[:, -1:] - out.weights.view(-1, traces)
    score = kernels.posterior_score_weights(kernel_bounds(space, toy, index), offsets(*index.shape))
    assert_equal(score.view(-1, traces), coefficient)
    probability = toy.log_q.detach()[index].sum(dim=1).exp()
    estimator = (probability * (coefficient * toy.log_q[index]).sum(dim=1)).sum()
    assert_equal(grad(bound, toy.posterior), grad(estimator, toy.posterior))


def test_answer_gradient_is_the_mean_over_correct_answers(toy):
    """grad log c(z) = E[1(correct) grad log pi(y|x,z)] / c, and per pair of answers their weight is
    shared."""
    correct = torch.isin(torch.arange(ANSWERS), torch.tensor(toy.correct))
    pairs = tuples(ANSWERS, 2)
    scores = correct[pairs].flatten()
    share = share_over_answers(torch.ones(len(pairs), dtype=torch.float64), scores, offsets(*pairs.shape))
    for z in range(THOUGHTS):
        log_answer = toy.log_answer[z]
        exact = grad(toy.log_c[z], toy.answer)
        inside = (log_answer.detach().exp() * correct * log_answer).sum() / toy.log_c[z].detach().exp()
        assert_equal(exact, grad(inside, toy.answer))
        probability = log_answer.detach()[pairs].sum(dim=1).exp()
        c = toy.log_c[z].detach().exp()
        success = c * (2 - c)  # of at least one correct answer
        sampled = (probability * (share.view(-1, 2) * log_answer[pairs]).sum(dim=1)).sum() / success
        assert_equal(exact, grad(sampled, toy.answer))


def test_special_cases_of_the_weights(space, toy):
    """A.6: q = pi gives c_k / sum c; one trace gives weight one; E_q[log(pi(z,Y)/q) grad log q] for phi."""
    index = tuples(THOUGHTS, 3)
    c = toy.log_c.detach().exp()[index]
    normalised_verifree = (c / c.sum(dim=1, keepdim=True)).flatten()
    assert_equal(weigh_tuples(space, toy, index, toy.thought.detach()).weights, normalised_verifree)
    assert_equal(weigh_tuples(space, toy, index, ratio="none").weights, normalised_verifree)
    single = weigh_tuples(space, toy, tuples(THOUGHTS, 1))
    assert_equal(single.weights, 1)
    elbo = toy.log_evidence.detach() - kl(toy.log_q, toy.log_true_posterior.detach())
    estimator = (toy.log_q.detach().exp() * single.bounds * toy.log_q).sum()
    assert_equal(grad(elbo, toy.posterior), grad(estimator, toy.posterior))
    # Eq. 34: the same as a policy gradient on q with reward log c - log q/pi.
    reward = (toy.log_c - (toy.log_q - toy.log_pi)).detach()
    assert_equal(single.bounds, reward)


def test_geometric_ratio_is_the_per_token_mean(space, toy):
    """Eq. 8: rho = (pi/q)^(1/|z|) c, |z| with the end marker."""
    index = tuples(THOUGHTS, 2)
    lengths = torch.tensor([t.numel() for t in space.token_logprobs(toy.thought)])
    ratio = (toy.log_pi - toy.log_q).exp() ** (1 / lengths.double())
    rho = (ratio * toy.log_c.exp()).detach()[index]
    out = weigh_tuples(space, toy, index, ratio="geometric")
    assert_equal(out.weights, (rho / rho.sum(dim=1, keepdim=True)).flatten())
    assert_equal(out.bounds.view(-1, 2)[:, 1], rho.mean(dim=1).log())


# Posterior


def test_forward_kl_gradient_has_a_minus(space, toy):
    """Eq. 9 with its sign put right: grad KL(P(z|x,Y)||q) = -E_pi[c/P grad log q]."""
    index = torch.arange(THOUGHTS)[None]
    policy, cu_seqlens = ragged(space.token_logprobs(toy.thought.detach()), index)
    # All thoughts as the traces of one question, against a proposal of one everywhere: rho = pi(z) c(z).
    scored = ScoredTraces(
        question_ids=("all",),
        question_offsets=torch.tensor([0, THOUGHTS]),
        log_c=toy.log_c.detach(),
        policy_logprobs=policy,
        posterior_logprobs=torch.zeros_like(policy),
        cu_seqlens=cu_seqlens,
    )
    out = weigh(scored, ratio="full")
    assert_equal(out.weights, toy.log_true_posterior.exp())
    assert_equal(out.bounds[-1] + math.log(THOUGHTS), toy.log_evidence)
    gradient = grad(kl(toy.log_true_posterior.detach(), toy.log_q), toy.posterior)
    assert_equal(gradient, -grad((out.weights * toy.log_q).sum(), toy.posterior))
    expectation = ((toy.log_pi + toy.log_c - toy.log_evidence).detach().exp() * toy.log_q).sum()
    assert_equal(gradient, -grad(expectation, toy.posterior))


def test_self_normalised_forward_kl_is_consistent(toy):
    """Eq. 9 with M traces: the package's weights against c_m / sum c, and the bias falls like 1/M."""
    exact = -grad(kl(toy.log_true_posterior.detach(), toy.log_q), toy.posterior)
    errors = []
    for traces in (1, 2, 4):
        index = tuples(THOUGHTS, traces)
        out = forward_kl_weights(ids(len(index)), offsets(*index.shape), toy.log_c.detach()[index].flatten())
        c = toy.log_c.detach().exp()[index]
        assert_equal(out.weights.view(-1, traces), c / c.sum(dim=1, keepdim=True))
        probability = toy.log_pi.detach()[index].sum(dim=1).exp()
        ascent = (probability * (out.weights.view(-1, traces) * toy.log_q[index]).sum(dim=1)).sum()
        errors.append((grad(ascent, toy.posterior) - exact).norm())
    assert errors[2] < errors[1] < errors[0]


# Estimators of c


def test_accuracy_is_unbiased_with_binomial_variance(toy):
    """Theorem 1: E = c and Var = c (1 - c) / N."""
    correct = torch.isin(torch.arange(ANSWERS), torch.tensor(toy.correct))
    for samples in (1, 2, 3):
        index = tuples(ANSWERS, samples)
        estimate = log_accuracy(correct[index].flatten().double(), offsets(*index.shape)).exp()
        for z in range(THOUGHTS):
            c = toy.log_c[z].exp()
            probability = toy.log_answer[z][index].sum(dim=1).exp()
            mean = (probability * estimate).sum()
            assert_equal(mean, c)
            assert_equal((probability * (estimate - mean) ** 2).sum(), c * (1 - c) / samples)


def test_likelihood_is_unbiased_with_bounded_variance(space, toy):
    """|Y| E_{y~U(Y)} pi(y|x,z) = c; variance at most (|Y| - 1) c^2, so zero for one answer."""
    size = len(toy.correct)
    for z in range(THOUGHTS):
        tokens, cu_seqlens = ragged(space.token_logprobs(toy.answer[z].detach()), torch.tensor(toy.correct))
        estimate = log_likelihood(tokens, cu_seqlens, answer_count=size).exp()
        c = toy.log_c[z].exp()
        assert_equal(estimate.mean(), c)
        assert estimate.var(unbiased=False) <= (size - 1) * c**2 + 1e-12
        gml = log_gml(tokens, cu_seqlens).exp()
        lengths = cu_seqlens.diff()
        assert_equal(gml, toy.log_answer[z, list(toy.correct)].exp() ** (1 / lengths.double()))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("c", [0.05, 0.2, 0.5, 0.9])
def test_worst_case_of_the_likelihood(size, c):
    """Theorem 1: with all of c on one answer Var = (|Y| - 1) c^2; the accuracy wins iff c >= 1/|Y|."""
    # The other answers of Y have probability zero: one token each, log-prob -inf.
    tokens = torch.tensor([math.log(c)] + [-math.inf] * (size - 1), dtype=torch.float64)
    estimate = log_likelihood(tokens, torch.arange(size + 1), answer_count=size).exp()
    variance = estimate.var(unbiased=False).item()
    assert_equal(estimate.mean(), c)
    assert_equal(variance, (size - 1) * c**2)
    scores = torch.tensor([1, 0])
    hit = log_accuracy(scores.double(), torch.arange(3)).exp()
    probability = torch.tensor([c, 1 - c], dtype=torch.float64)
    accuracy_variance = (probability * (hit - c) ** 2).sum().item()
    assert_equal(accuracy_variance, c * (1 - c))
    assert (accuracy_variance <= variance + 1e-12) == (c >= 1 / size - 1e-12)


# Rejection sampling and reinforcement learning as forward KL


def outcome_pairs(toy) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of (thought, correct or not) samples: thoughts [196, 2], scores [196, 2], probability
    [196]."""
    pairs = tuples(2 * THOUGHTS, 2)
    thought, score = pairs % THOUGHTS, (pairs // THOUGHTS).double()
    c = toy.log_c.detach().exp()
    single = toy.log_pi.detach().exp().repeat(2) * torch.cat([1 - c, c])
    return thought, score, single[pairs].prod(dim=1)


@pytest.mark.parametrize("question_weight", ["none", "inverse_accuracy", "inverse_std"])
def test_rft_is_forward_kl_times_the_accuracy(toy, question_weight):
    """Eq. 10 away from pi_ref (here: the q table as the policy in training), and its multipliers; optimum."""
    thought, score, probability = outcome_pairs(toy)
    p = toy.log_evidence.detach().exp()
    weights = rft_weights(
        score.flatten(), offsets(*score.shape), question_weight=question_weight, accuracy=p.expand(len(score))
    ).view(-1, 2)
    factor = {"none": p, "inverse_accuracy": 1.0, "inverse_std": (p / (1 - p)).sqrt()}[question_weight]
    trained = toy.posterior
    ascent = (probability * (weights * toy.log_q[thought]).sum(dim=1)).sum()
    descent = factor * kl(toy.log_true_posterior.detach(), toy.log_q)
    assert_equal(grad(ascent, trained), -grad(descent, trained))
    # A question's mass is what the factor says it is.
    assert_equal((probability * weights.sum(dim=1)).sum(), factor)


def test_rft_moves_to_the_posterior_and_stays(space, toy):
    best = space.table_of(toy.log_true_posterior.detach()).requires_grad_()
    thought, score, probability = outcome_pairs(toy)
    weights = rft_weights(score.flatten(), offsets(*score.shape)).view(-1, 2)
    log_best = space.sequence_logprobs(best)
    assert_equal(grad((probability * (weights * log_best[thought]).sum(dim=1)).sum(), best), 0)


def test_rft_jointly_fits_thought_and_answer(space, toy):
    """E_ref[1(y in Y) log pi(z, y|x)] = -P KL(P_ref(z, y|x,Y) || pi(z, y|x)) + const, trained jointly."""
    generator = torch.Generator().manual_seed(11)
    thought = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    answer = torch.randn(7, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    chosen = list(toy.correct)
    log_joint = (space.sequence_logprobs(thought)[:, None] + space.sequence_logprobs(answer))[:, chosen]
    log_ref = (toy.log_pi[:, None] + toy.log_answer)[:, chosen].detach()
    objective = (log_ref.exp() * log_joint).sum()
    target = log_ref - toy.log_evidence.detach()
    descent = toy.log_evidence.detach().exp() * kl(target, log_joint)
    assert_equal(grad(objective, thought, answer), -grad(descent, thought, answer))


def test_question_weight_turns_rft_into_the_self_normalised_objective(toy):
    """Tuple by tuple: RFT over its own sum, RFT over the batch's accuracy, and rho~ with ratio "none"."""
    _, score, _ = outcome_pairs(toy)
    where = offsets(*score.shape)
    variational = forward_kl_weights(ids(len(score)), where, score.flatten().log()).weights
    for kind in ("self_normalised", "inverse_accuracy"):
        assert_equal(rft_weights(score.flatten(), where, question_weight=kind), variational)
    masses = variational.view(-1, 2).sum(dim=1)
    assert_equal(masses, score.any(dim=1).double())


def test_binary_reward_and_grpo_are_local_forward_kl(toy):
    """Eq. 11 and 12: multipliers P and sqrt(P / (1 - P)), with respect to pi(z|x)."""
    p = toy.log_evidence.detach().exp()
    descent = kl(toy.log_true_posterior.detach(), toy.log_pi)
    reward = (toy.log_pi.exp() * toy.log_c.exp()).sum()
    gradient = grad(reward, toy.thought)
    assert_equal(gradient, -p * grad(descent, toy.thought))
    # One sample (z, y): reward 1 or 0 is its weight, and the knob divides it.
    c, pi = toy.log_c.detach().exp(), toy.log_pi.detach().exp()
    rewards = torch.cat([torch.ones(THOUGHTS), torch.zeros(THOUGHTS)]).double()
    probability = torch.cat([pi * c, pi * (1 - c)])
    log_pi = toy.log_pi.repeat(2)
    for kind, factor in (
        ("none", p),
        ("inverse_std", (p / (1 - p)).sqrt()),
        ("inverse_accuracy", torch.ones(())),
    ):
        weights = question_multiplied(
            rewards, offsets(2 * THOUGHTS, 1), kind, accuracy=p.expand(2 * THOUGHTS)
        )
        estimator = (probability * weights * log_pi).sum()
        assert_equal(grad(estimator, toy.thought), -factor * grad(descent, toy.thought))
    # GRPO's advantage subtracts the mean as well, which changes no expectation.
    advantage = (rewards - p) / (p * (1 - p)).sqrt()
    estimator = (probability * advantage * log_pi).sum()
    assert_equal(grad(estimator, toy.thought), -(p / (1 - p)).sqrt() * grad(descent, toy.thought))


def test_reward_gradient_of_the_answers(toy):
    """A.7: with respect to pi(y|x,z), grad P = E_{pi(z|x)}[grad c(z)]."""
    reward = (toy.log_pi.detach().exp() * toy.log_c.exp()).sum()
    correct = torch.isin(torch.arange(ANSWERS), torch.tensor(toy.correct))
    probability = (toy.log_pi[:, None] + toy.log_answer).detach().exp()
    estimator = (probability * correct * toy.log_answer).sum()
    assert_equal(grad(reward, toy.answer), grad(estimator, toy.answer))
    assert_equal(grad(toy.log_evidence.exp(), toy.answer), grad(estimator, toy.answer))


def shaped(toy) -> tuple[Tensor, Tensor, tuple[float, float, float]]:
    """log P(Y_fmt|x,z) per thought, log P(Y_fmt|x), and the rewards alpha > beta > gamma."""
    well_formed = sorted({*toy.correct, 0, 2, 3})
    log_format = toy.log_answer[:, well_formed].logsumexp(dim=1)
    return log_format, (toy.log_pi + log_format).logsumexp(dim=0), (1.0, 0.1, -0.5)


def test_reward_shaping_adds_a_forward_kl_to_the_format(toy):
    """A.5 with its sign put right: both terms carry a minus, and only differences of rewards matter."""
    log_format, evidence_format, (alpha, beta, gamma) = shaped(toy)
    c, f = toy.log_c.exp(), log_format.exp()
    reward = (toy.log_pi.exp() * (alpha * c + beta * (f - c) + gamma * (1 - f)).detach()).sum()
    to_correct = kl(toy.log_true_posterior.detach(), toy.log_pi)
    to_format = kl((toy.log_pi + log_format - evidence_format).detach(), toy.log_pi)
    p, p_format = toy.log_evidence.detach().exp(), evidence_format.detach().exp()
    expected = -(alpha - beta) * p * grad(to_correct, toy.thought) - (beta - gamma) * p_format * grad(
        to_format, toy.thought
    )
    assert_equal(grad(reward, toy.thought), expected)


def test_debiased_reward_and_its_optimum(space, toy):
    """Eq. 24: dividing each term by its own probability, per question, with the optimum a mixture."""
    log_format, evidence_format, (alpha, beta, gamma) = shaped(toy)
    p, p_format = toy.log_evidence.detach().exp(), evidence_format.detach().exp()
    one = offsets(THOUGHTS, 1)
    correct_term, format_term = (
        question_multiplied(v.detach().exp(), one, "inverse_accuracy", accuracy=m.expand(THOUGHTS))
        for v, m in ((toy.log_c, p), (log_format, p_format))
    )
    reward = (alpha - beta) * correct_term + (beta - gamma) * format_term
    posterior = toy.log_true_posterior.detach()
    posterior_format = (toy.log_pi + log_format - evidence_format).detach()

    def descent(log_policy: Tensor) -> Tensor:
        return (alpha - beta) * kl(posterior, log_policy) + (beta - gamma) * kl(posterior_format, log_policy)

    estimator = (toy.log_pi.detach().exp() * reward * toy.log_pi).sum()
    assert_equal(grad(estimator, toy.thought), -grad(descent(toy.log_pi), toy.thought))
    mixture = ((alpha - beta) * posterior.exp() + (beta - gamma) * posterior_format.exp()) / (alpha - gamma)
    best = space.table_of(mixture.log()).requires_grad_()
    assert_equal(grad(descent(space.sequence_logprobs(best)), best), 0)


def test_true_posterior_has_no_variance(space, toy):
    """A.8: argmin_q Var_q[(pi/q) c] is P(z|x,Y), with variance zero; then all weights are equal."""
    joint = (toy.log_pi + toy.log_c).detach()
    p = toy.log_evidence.detach().exp()

    def variance(log_q: Tensor) -> Tensor:
        return (log_q.exp() * ((joint - log_q).exp() - p) ** 2).sum()

    best = space.table_of(toy.log_true_posterior.detach())
    out = weigh_tuples(space, toy, tuples(THOUGHTS, 3), best)
    assert_equal(out.log_rho, toy.log_evidence.expand(3 * THOUGHTS**3))
    assert_equal(out.weights, 1 / 3)
    assert_equal(out.ess, 3.0)
    assert_equal(variance(space.sequence_logprobs(best)), 0)
    assert variance(toy.log_q.detach()) > 1e-12
    # The package's rho of single traces has the variance of any other proposal too.
    rho = weigh_tuples(space, toy, tuples(THOUGHTS, 1)).log_rho.exp()
    assert_equal((toy.log_q.detach().exp() * (rho - p) ** 2).sum(), variance(toy.log_q.detach()))
