"""A space small enough to enumerate: every thought, every answer, every K-tuple, in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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


def _make(name: str, seed: int, correct: tuple[int, ...], ease: float) -> Toy:
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


@pytest.fixture
def space() -> SimpleNamespace:
    """The table functions; test modules cannot import a conftest."""
    return SimpleNamespace(
        token_logprobs=token_logprobs, sequence_logprobs=sequence_logprobs, table_of=table_of
    )


@pytest.fixture(params=["easy", "medium", "hard", "hopeless"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return {
        "easy": lambda: _make("easy", 1, (4,), 4.0),
        "medium": lambda: _make("medium", 2, (1, 5), 0.5),
        "hard": lambda: _make("hard", 3, (6, 5, 3), -3.0),
        "hopeless": lambda: _make("hopeless", 4, (5,), -5.0),
    }[request.param]()
