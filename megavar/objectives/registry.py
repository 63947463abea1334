"""The one table of policy objectives: what data each needs, and the function that weighs it.

A new objective is a file with its formula, a line here, and its keys in `megavar.config.switches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megavar.objectives.estimators import log_gml, log_likelihood, log_mean_probability
from megavar.objectives.grpo import grpo_weights
from megavar.objectives.jepo import jepo_weights
from megavar.objectives.latro import latro_weights
from megavar.objectives.policy_gradient import SegmentWeights
from megavar.objectives.reinforce import reinforce_weights
from megavar.objectives.rft import rft_weights
from megavar.objectives.segments import check_offsets, kept_offsets, offsets_of
from megavar.objectives.shaped import shaped_weights
from megavar.objectives.verifree import verifree_weights

Need = Literal[
    "proposals",
    "answers",
    "own",
    "own_reference",
    "own_samples",
    "own_initial",
    "own_posterior",
    "own_prompted",
    "prompted",
]
"""`proposals`: the posterior's traces, scored under policy and posterior. `answers`: N verified answers after each.
`own`: the policy's own traces with their answers and verdicts. `own_reference`: log pi of their thoughts and of the
reference solution behind. `own_samples`: log pi of all that was sampled. `own_initial`: log pi_0 of their thoughts.
`own_posterior`: log q of their thoughts. `prompted`: traces of the policy itself under the posterior's prompt, scored
under both; `own_prompted`: its own traces under that prompt."""
_COUNTING = ("accuracy", "hybrid")
"""Estimators of c(z) that count right answers."""
Kind = Literal["dataset", "proposals", "samples", "reference", "two_prompts"]
"""What is trained on: the data set's traces; proposals; own samples, thought and own answer; own thoughts and the
reference solution behind; one model's traces under both prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """N traces of Q questions that the policy drew for itself, ragged."""

    question_offsets: Tensor
    """integer [Q+1]."""
    correct: Tensor
    """bool [N]: the sample's own answer."""
    well_formed: Tensor
    """bool [N]: thought and answer both have their end markers."""
    lengths: Tensor
    """int64 [N]: sampled tokens."""
    mean_length: float
    """Of all samples of the training set."""
    reference_logprobs: Tensor | None = None
    """float [A]: log pi of the reference solution's tokens after each thought."""
    reference_offsets: Tensor | None = None
    """integer [N+1]; a thought without end marker has none."""
    log_ratio: Tensor | None = None
    """float [N]: log pi(z) - log pi_0(z) of the thoughts; None where pi is pi_0."""

    def log_likelihood(self) -> Tensor:
        """log pi(y*|x,z), float [N]; -inf for an open thought, after which there is no answer."""
        return self._of_reference(log_likelihood)

    def rewards(self, kind: str) -> Tensor:
        """float [N] in [0, 1]: the verdict, or a probability of the reference solution."""
        if kind == "verdict":
            return self.correct.float()
        return self._of_reference(
            {"gml": log_gml, "likelihood": log_likelihood}.get(kind, log_mean_probability)
        ).exp()

    def _of_reference(self, estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if self.reference_logprobs is None or self.reference_offsets is None:
            raise ValueError("the reference solution was not scored")
        found = estimator(self.reference_logprobs, self.reference_offsets)
        return torch.where(self.reference_offsets.diff() > 0, found, -torch.inf)

    def subset(self, kept: Tensor) -> Samples:
        """The samples where bool [N] `kept`."""
        reference, offsets = self.reference_logprobs, self.reference_offsets
        if reference is not None and offsets is not None:
            reference = reference[torch.repeat_interleave(kept, offsets.diff())]
            offsets = offsets_of(offsets.diff()[kept])
        return Samples(
            question_offsets=kept_offsets(kept, self.question_offsets),
            correct=self.correct[kept],
            well_formed=self.well_formed[kept],
            lengths=self.lengths[kept],
            mean_length=self.mean_length,
            reference_logprobs=reference,
            reference_offsets=offsets,
            log_ratio=None if self.log_ratio is None else self.log_ratio[kept],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    kind: Kind
    needs: frozenset[Need]
    """Of every arm; `needs_of` adds what the arm's switches ask for."""
    weigh: Callable[[Samples, Any], Tensor | SegmentWeights] | None = None
    """(samples, arm) -> weights [N], or separate ones of thought and answer. The arm has the recipe's keys as
    attributes. None for kinds other than samples and reference, whose weights are made of other data."""
    whole_only: bool = False
    """Only thoughts with an end marker take part; otherwise an open sample has reward zero."""


def _reinforce(samples: Samples, arm: Any) -> Tensor:
    return reinforce_weights(
        samples.rewards(arm.reward),
        samples.question_offsets,
        baseline=arm.baseline,
        question_weight=arm.question_weight or "none",
    )


def _grpo(samples: Samples, arm: Any) -> Tensor:
    return grpo_weights(
        samples.rewards(arm.reward),
        samples.question_offsets,
        lengths=samples.lengths,
        mean_length=samples.mean_length,
        length_norm=arm.length_norm,
        question_weight=arm.question_weight or "inverse_std",
    )


def _shaped(samples: Samples, arm: Any) -> Tensor:
    return shaped_weights(
        samples.correct & samples.well_formed,
        samples.well_formed,
        samples.question_offsets,
        rewards=arm.shaping,
        baseline=arm.baseline,
        question_weight=arm.question_weight or "none",
    )


def _verifree(samples: Samples, arm: Any) -> SegmentWeights:
    return verifree_weights(
        samples.log_likelihood(),
        samples.question_offsets,
        baseline=arm.baseline,
        question_weight=arm.question_weight or "none",
        answer_weight=arm.answer_weight,
    )


def _latro(samples: Samples, arm: Any) -> SegmentWeights:
    return latro_weights(
        samples.log_likelihood(),
        samples.question_offsets,
        log_ratio=samples.log_ratio,
        kl=0.05 if arm.kl is None else arm.kl,
        baseline=arm.baseline,
        answer_weight=arm.answer_weight,
    )


def _jepo(samples: Samples, arm: Any) -> SegmentWeights:
    return jepo_weights(
        samples.log_likelihood(),
        samples.question_offsets,
        bound=arm.bound,
        normalised=arm.normalised,
        answer_weight=arm.answer_weight,
    )


def _rft(samples: Samples, arm: Any) -> Tensor:
    return rft_weights(
        samples.correct.float(), samples.question_offsets, question_weight=arm.question_weight or "none"
    )


OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective(kind="dataset", needs=frozenset()),
    "variational": Objective(kind="proposals", needs=frozenset({"proposals"})),
    "elbo": Objective(kind="proposals", needs=frozenset({"proposals"})),
    "mixture": Objective(
        kind="proposals", needs=frozenset({"proposals", "own", "own_reference", "own_posterior"})
    ),
    "covrl": Objective(
        kind="two_prompts", needs=frozenset({"prompted", "own", "own_reference", "own_prompted"})
    ),
    "ravr": Objective(kind="two_prompts", needs=frozenset({"prompted", "own", "own_reference"})),
    "rft": Objective(kind="samples", needs=frozenset({"own"}), weigh=_rft),
    "reinforce": Objective(kind="samples", needs=frozenset({"own"}), weigh=_reinforce),
    "grpo": Objective(kind="samples", needs=frozenset({"own"}), weigh=_grpo),
    "shaped": Objective(kind="samples", needs=frozenset({"own"}), weigh=_shaped),
    "verifree": Objective(kind="reference", needs=frozenset({"own", "own_reference"}), weigh=_verifree),
    "latro": Objective(
        kind="reference", needs=frozenset({"own", "own_reference"}), weigh=_latro, whole_only=True
    ),
    "jepo": Objective(
        kind="reference", needs=frozenset({"own", "own_reference"}), weigh=_jepo, whole_only=True
    ),
}


def needs_of(arms: Iterable[Any]) -> frozenset[Need]:
    """The data that these arms need together."""
    needs: set[Need] = set()
    for arm in arms:
        objective = OBJECTIVES[arm.objective]
        needs |= objective.needs
        if arm.objective == "variational" and arm.estimator in _COUNTING:
            needs.add("answers")
        if arm.reward != "verdict":
            needs.add("own_reference")
        if arm.importance != "none" and not objective.whole_only:
            needs.add("own_samples")  # open thoughts have a ratio too
        if arm.objective == "latro" and arm.kl != 0:
            needs.add("own_initial")
    return frozenset(needs)


def posterior_counts_answers(posterior: Any) -> bool:
    """Whether answers are sampled behind the traces that a posterior with these keys is fitted to."""
    if posterior.objective == "forward_kl":
        return True
    return posterior.objective not in ("sft", "rlt") and posterior.estimator in _COUNTING


def weigh_samples(samples: Samples, arm: Any) -> SegmentWeights:
    """The arm's weights of thought and answer, float [N]; zero for samples that the arm leaves out."""
    objective = OBJECTIVES[arm.objective]
    if objective.weigh is None:
        raise ValueError(f"{arm.objective} does not weigh the policy's own samples")
    check_offsets(samples.question_offsets, samples.correct.numel(), "question_offsets")
    kept = torch.ones_like(samples.well_formed)
    if objective.whole_only:
        assert samples.reference_offsets is not None
        kept = samples.reference_offsets.diff() > 0
    elif arm.mask_open:
        kept = samples.well_formed
    found = objective.weigh(samples.subset(kept), arm)
    pair = found if isinstance(found, SegmentWeights) else SegmentWeights(found, found)
    spread = (torch.zeros(kept.numel()).masked_scatter(kept, part.float()) for part in pair)
    return SegmentWeights(*spread)
