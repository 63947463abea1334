"""A space small enough to enumerate: every thought, every answer, every K-tuple, in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import megavar_kernels as kernels
import torch
from torch import Tensor

from megavar.objectives.weights import ScoredTraces, TraceWeights, weigh

THOUGHTS = ANSWERS = 7
LONGEST = 2
"""Symbols of a sequence before its end marker, which is forced there."""
SEQUENCES = [s for n in range(LONGEST + 1) for s in itertools.product((0, 1), repeat=n)]
"""The 7 sequences over two symbols; with the end marker they have 1 to 3 tokens."""
PREFIXES = [s for s in SEQUENCES if len(s) < LONGEST]
END = 2


def token_logprobs(logits: Tensor) -> list[Tensor]:
    """Autoregressive table [..., len(PREFIXES), 3] -> for each sequence its tokens' log-probs [...,
    tokens]."""
    table = logits.log_softmax(dim=-1)
    out = []
    for sequence in SEQUENCES:
        terms = [table[..., PREFIXES.index(sequence[:i]), s] for i, s in enumerate(sequence)]
        end = (
            table[..., PREFIXES.index(sequence), END]
            if len(sequence) < LONGEST
            else torch.zeros_like(table[..., 0, 0])
        )
        out.append(torch.stack([*terms, end], dim=-1))
    return out


def sequence_logprobs(logits: Tensor) -> Tensor:
    """[..., 7] log-probs of the sequences; their exponentials sum to one."""
    return torch.stack([t.sum(dim=-1) for t in token_logprobs(logits)], dim=-1)


def table_of(log_distribution: Tensor) -> Tensor:
    """The autoregressive table [3, 3] whose sequences have the given log-probs [7]."""
    rows = []
    for prefix in PREFIXES:
        starts = [
            [i for i, s in enumerate(SEQUENCES) if s[: len(prefix) + 1] == (*prefix, v)] for v in (0, 1)
        ]
        ends = [SEQUENCES.index(prefix)]
        rows.append(torch.stack([log_distribution[i].logsumexp(dim=0) for i in (*starts, ends)]))
    return torch.stack(rows)


@dataclass
class Toy:
    """One question: pi(z|x), q(z|x,y') and pi(y|x,z) as tables, and the set of correct answers."""

    name: str
    thought: Tensor
    """[3, 3] logits of pi(z|x), requires grad."""
    posterior: Tensor
    """[3, 3] logits of q(z|x,y'), requires grad."""
    answer: Tensor
    """[7, 3, 3] logits of pi(y|x,z) for each z, requires grad."""
    correct: tuple[int, ...]
    """Indices of Y_x."""

    @property
    def log_pi(self) -> Tensor:
        return sequence_logprobs(self.thought)

    @property
    def log_q(self) -> Tensor:
        return sequence_logprobs(self.posterior)

    @property
    def log_answer(self) -> Tensor:
        """[7, 7] log pi(y|x,z) at [z, y]."""
        return sequence_logprobs(self.answer)

    @property
    def log_c(self) -> Tensor:
        """[7] log pi(Y_x|x,z)."""
        return self.log_answer[:, list(self.correct)].logsumexp(dim=1)

    @property
    def log_evidence(self) -> Tensor:
        """log P(Y_x|x)."""
        return (self.log_pi + self.log_c).logsumexp(dim=0)

    @property
    def log_true_posterior(self) -> Tensor:
        """[7] log P(z|x,Y_x)."""
        return self.log_pi + self.log_c - self.log_evidence


def make_toy(name: str, seed: int, correct: tuple[int, ...], ease: float) -> Toy:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    answer = 0.7 * draw(7, 3, 3)
    # Push every thought towards or away from the first correct answer, some more than others.
    target = SEQUENCES[correct[0]]
    for i, symbol in enumerate([*target, END][:LONGEST]):
        answer[:, PREFIXES.index(target[:i]), symbol] += ease * (1 + 0.3 * draw(7))
    tables = (draw(3, 3), draw(3, 3), answer)
    thought, posterior, answer = (t.requires_grad_() for t in tables)
    return Toy(name, thought, posterior, answer, correct)


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
    toy: Toy, index: Tensor, proposal: Tensor | None = None, ratio: str = "full"
) -> TraceWeights:
    """The package's weights of all K-tuples at once: each tuple is a question with K traces."""
    policy, cu_seqlens = ragged(token_logprobs(toy.thought.detach()), index)
    proposal = toy.posterior.detach() if proposal is None else proposal
    posterior, _ = ragged(token_logprobs(proposal), index)
    scored = ScoredTraces(
        question_ids=ids(index.shape[0]),
        question_offsets=offsets(*index.shape),
        log_c=toy.log_c.detach()[index].flatten(),
        policy_logprobs=policy,
        posterior_logprobs=posterior,
        cu_seqlens=cu_seqlens,
    )
    return weigh(scored, ratio=ratio)


def kernel_bounds(toy: Toy, index: Tensor) -> kernels.TraceWeights:
    """The kernel itself on all K-tuples, with its own gradients."""
    policy, cu_seqlens = ragged(token_logprobs(toy.thought), index)
    posterior, _ = ragged(token_logprobs(toy.posterior.detach()), index)
    log_c = toy.log_c[index].flatten()
    where = offsets(*index.shape)
    return kernels.trace_weights(
        policy, posterior, cu_seqlens, where, log_likelihood=log_c, length_normalize=False
    )
