"""The table of objectives, the recipe's names and keys, and the data that arms ask for."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from megavar.config.recipe import Arm, Posterior, Recipe
from megavar.config.switches import ARM_SWITCHES, POSTERIOR_SWITCHES, PROPOSED
from megavar.objectives.grpo import grpo_weights
from megavar.objectives.jepo import jepo_weights
from megavar.objectives.latro import latro_weights
from megavar.objectives.policy_gradient import SegmentWeights
from megavar.objectives.registry import OBJECTIVES, Samples, needs_of, weigh_samples
from megavar.objectives.reinforce import reinforce_weights
from megavar.objectives.rft import rft_weights
from megavar.objectives.shaped import shaped_weights
from megavar.objectives.verifree import verifree_weights


def test_names_and_keys_agree_everywhere() -> None:
    names = get_args(Arm.model_fields["objective"].annotation)
    assert set(names) == OBJECTIVES.keys() == ARM_SWITCHES.keys()
    assert set(get_args(Posterior.model_fields["objective"].annotation)) == POSTERIOR_SWITCHES.keys()
    assert set().union(*ARM_SWITCHES.values()) == Arm.model_fields.keys() - {"name", "objective"}
    assert set().union(*POSTERIOR_SWITCHES.values()) == Posterior.model_fields.keys() - {
        "objective",
        "traces",
        "fit",
    }


def test_posteriors_are_fitted_where_they_propose() -> None:
    proposed = {name for name, objective in OBJECTIVES.items() if objective.kind == "proposals"}
    assert proposed == PROPOSED == {name for name, o in OBJECTIVES.items() if "proposals" in o.needs}


CLOSED = Samples(
    question_offsets=torch.tensor([0, 3, 5]),
    correct=torch.tensor([True, False, False, True, False]),
    well_formed=torch.tensor([True, True, False, True, True]),
    lengths=torch.tensor([4, 6, 8, 5, 2]),
    mean_length=5.0,
    reference_logprobs=torch.tensor([-1.0, -0.5, -2.0, -1.5, -0.25, -3.0]),
    reference_offsets=torch.tensor([0, 2, 3, 4, 5, 6]),
    log_ratio=torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0]),
)
OFFSETS, LIKELIHOOD = CLOSED.question_offsets, CLOSED.log_likelihood()
VERDICTS, LENGTHS = CLOSED.correct.float(), {"lengths": CLOSED.lengths, "mean_length": 5.0}
PUBLISHED = {  # what the functions do that know nothing of recipes
    "rft": lambda: rft_weights(VERDICTS, OFFSETS),
    "reinforce": lambda: reinforce_weights(VERDICTS, OFFSETS),
    "grpo": lambda: grpo_weights(VERDICTS, OFFSETS, **LENGTHS),
    "shaped": lambda: shaped_weights(CLOSED.correct, CLOSED.well_formed, OFFSETS),
    "verifree": lambda: verifree_weights(LIKELIHOOD, OFFSETS),
    "latro": lambda: latro_weights(LIKELIHOOD, OFFSETS, log_ratio=CLOSED.log_ratio),
    "jepo": lambda: jepo_weights(LIKELIHOOD, OFFSETS),
}
DATA = {
    "sft": set(),
    "variational": {"proposals", "answers"},
    "elbo": {"proposals"},
    "mixture": {"proposals", "own", "own_reference", "own_posterior"},
    "covrl": {"prompted", "own", "own_reference", "own_prompted"},
    "ravr": {"prompted", "own", "own_reference"},
    **dict.fromkeys(("rft", "reinforce", "grpo", "shaped"), {"own"}),
    "verifree": {"own", "own_reference"},
    "latro": {"own", "own_reference", "own_initial"},
    "jepo": {"own", "own_reference"},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_an_arm_with_its_defaults(name: str) -> None:
    """An arm that says no more than its name asks for its data and weighs as the function does by itself."""
    said = {"name": name, "objective": name} | ({"estimator": "gml"} if name == "mixture" else {})
    arm = Arm(**said)
    # The recipe's own default objective need not be said.
    assert arm.model_dump(exclude_defaults=True) == {
        k: v for k, v in said.items() if (k, v) != ("objective", "variational")
    }
    assert set(needs_of([arm])) == DATA[name]
    assert (OBJECTIVES[name].weigh is not None) == (name in PUBLISHED)
    if name not in PUBLISHED:
        with pytest.raises(ValueError, match="does not weigh"):
            weigh_samples(CLOSED, arm)
        return
    wanted, found = PUBLISHED[name](), weigh_samples(CLOSED, arm)
    thought, answer = wanted if isinstance(wanted, SegmentWeights) else (wanted, wanted)
    assert thought.abs().sum() > 0
    torch.testing.assert_close(found.thought, thought.float())
    torch.testing.assert_close(found.answer, answer.float().expand(5))


def test_each_arm_asks_for_its_own_data() -> None:
    def needs(**keys: object) -> set[str]:
        return set(needs_of([Arm(name="a", **keys)]))

    assert needs(objective="sft") == set()
    assert needs() == {"proposals", "answers"}
    assert needs(estimator="hybrid") == {"proposals", "answers"}
    assert needs(estimator="gml") == needs(objective="elbo") == {"proposals"}
    assert needs(objective="rft") == {"own"}
    assert needs(objective="grpo", reward="mean_probability") == {"own", "own_reference"}
    assert needs(objective="grpo", importance="clipped") == {"own", "own_samples"}
    assert needs(objective="latro", importance="token", kl=0) == {"own", "own_reference"}
    assert needs(objective="verifree", importance="token") == {"own", "own_reference", "own_samples"}
    assert set(needs_of([Arm(name="a", objective="rft"), Arm(name="b", estimator="gml")])) == {
        "own",
        "proposals",
    }


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"objective": "rft", "ratio": "full"},
            'ratio has no meaning for objective = "rft"; its keys: question',
        ),
        ({"objective": "grpo", "baseline": "none"}, "baseline has no meaning"),
        ({"objective": "grpo", "clip_high": 0.28}, 'clip_high needs importance = "clipped"'),
        ({"objective": "grpo", "question_weight": "self_normalised"}, "needs baseline|signed"),
        ({"objective": "verifree", "question_weight": "self_normalised"}, 'needs baseline = "none"'),
        ({"objective": "shaped", "question_weight": "inverse_std"}, "Eq. 24"),
        ({"objective": "shaped", "shaping": (0.0, 1.0, 0.0)}, "shaping must fall"),
        ({"objective": "mixture"}, "scores the reference solution"),
        ({"objective": "covrl", "ratio": "full"}, "its keys: answer_weight, kl, ratio_clip"),
        ({"objective": "latro", "normalised": True}, "normalised has no meaning"),
        ({"estimator": "gml", "answer": "sampled"}, "others sample no answers"),
    ],
)
def test_a_key_without_meaning_is_named(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Arm(name="a", **keys)


def online(arm: dict, *, staleness: int = 0, **fields: object) -> Recipe:
    return Recipe(
        model={"path": "m"},
        data={s: {"kind": "jsonl", "path": "p"} for s in ("train", "eval")},
        rounds=2,
        warm_start="initial",
        rollout={"staleness": staleness},
        arms=({"name": "a", **arm},),
        **fields,
    )


def test_online_rounds_know_what_they_can_fit() -> None:
    with pytest.raises(ValidationError, match="forward_kl"):
        online({}, posterior={"objective": "iwae"})
    assert online({"objective": "grpo"}, posterior={"objective": "iwae"}).rounds == 2  # it has no posterior
    with pytest.raises(ValidationError, match="which is -inf for accuracy 0"):
        Posterior(objective="reverse_kl", estimator="accuracy")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_sampling_objective_can_be_the_arm_of_online_rounds(name: str) -> None:
    """Without ratio in step; a round behind with one, or not at all, and the refusal names the way out."""
    arm = {"objective": name, **({"estimator": "gml"} if name == "mixture" else {})}
    if name == "sft":
        with pytest.raises(ValidationError, match="the same in every round"):
            online(arm)
        return
    assert online(arm).arms[0].objective == name
    if name in ("mixture", "ravr"):
        with pytest.raises(ValidationError, match="set rollout.staleness = 0"):
            online(arm, staleness=1)
    elif "importance" in ARM_SWITCHES[name]:
        with pytest.raises(ValidationError, match='set importance = "token", "sequence" or "clipped"'):
            online(arm, staleness=1)
        assert online(arm | {"importance": "token"}, staleness=1).rollout.staleness == 1
    else:
        assert online(arm, staleness=1).rollout.staleness == 1


def samples() -> Samples:
    """Two questions: three samples, the last one open; one sample."""
    return Samples(
        question_offsets=torch.tensor([0, 3, 4]),
        correct=torch.tensor([True, False, False, True]),
        well_formed=torch.tensor([True, True, False, True]),
        lengths=torch.tensor([4, 6, 8, 5]),
        mean_length=6.0,
        reference_logprobs=torch.tensor([-1.0, -0.5, -2.0, -0.25]),
        reference_offsets=torch.tensor([0, 2, 3, 3, 4]),
    )


def test_open_samples_are_rewarded_with_nothing_or_left_out() -> None:
    with_open = weigh_samples(samples(), Arm(name="a", objective="reinforce", baseline="mean"))
    assert with_open.thought.tolist() == pytest.approx([2 / 9, -1 / 9, -1 / 9, 0])
    without = weigh_samples(samples(), Arm(name="a", objective="reinforce", baseline="mean", mask_open=True))
    assert without.thought.tolist() == pytest.approx([0.25, -0.25, 0, 0])
    verifree = weigh_samples(samples(), Arm(name="a", objective="verifree", baseline="none"))
    assert verifree.answer.tolist() == pytest.approx(
        [
            float(torch.tensor(-1.5).exp()) / 3,
            float(torch.tensor(-2.0).exp()) / 3,
            0,
            float(torch.tensor(-0.25).exp()),
        ]
    )
    # Where log pi(y*|x,z) is the reward there is none for an open thought: K is the number of closed ones.
    latro = weigh_samples(samples(), Arm(name="a", objective="latro"))
    assert latro.thought.tolist() == pytest.approx([0.25, -0.25, 0, -0.25])
    assert latro.answer.tolist() == [0.5, 0.5, 0, 1]
    jepo = weigh_samples(samples(), Arm(name="a", objective="jepo", bound="single"))
    assert torch.equal(jepo.thought, latro.thought)


@pytest.mark.parametrize(
    "keys",
    [
        *({"objective": name} for name in PUBLISHED),
        *({"objective": "grpo", "reward": reward} for reward in ("gml", "likelihood")),
        {"objective": "reinforce", "reward": "likelihood", "question_weight": "inverse_std"},
        {"objective": "verifree", "question_weight": "inverse_accuracy"},
        {"objective": "jepo", "normalised": True},
    ],
)
def test_a_question_is_weighed_by_its_own_samples_alone(keys: dict) -> None:
    """A hard question, whose solution no thought makes more probable than 1e-7, beside an easy one."""
    arm = Arm(name="a", **keys)
    hard = Samples(
        question_offsets=torch.tensor([0, 3]),
        correct=torch.tensor([True, False, False]),
        well_formed=torch.tensor([True, True, True]),
        lengths=torch.tensor([4, 6, 8]),
        mean_length=5.0,
        reference_logprobs=torch.tensor([-9.0, -10.0, -20.0, -1.0, -12.0, -14.0]),
        reference_offsets=torch.tensor([0, 2, 4, 6]),
    )
    assert hard.reference_logprobs is not None and CLOSED.reference_logprobs is not None
    both = Samples(
        question_offsets=torch.tensor([0, 3, 6, 8]),
        correct=torch.cat([hard.correct, CLOSED.correct]),
        well_formed=torch.cat([hard.well_formed, CLOSED.well_formed]),
        lengths=torch.cat([hard.lengths, CLOSED.lengths]),
        mean_length=5.0,
        reference_logprobs=torch.cat([hard.reference_logprobs, CLOSED.reference_logprobs]),
        reference_offsets=torch.tensor([0, 2, 4, 6, 8, 9, 10, 11, 12]),
    )
    alone, beside = weigh_samples(hard, arm), weigh_samples(both, arm)
    assert alone.thought.abs().sum() > 0
    for own, found in zip(alone, beside, strict=True):
        torch.testing.assert_close(found[:3], own, rtol=1e-6, atol=0)


def test_rewards_without_a_verifier() -> None:
    arm = Arm(name="a", objective="reinforce", reward="mean_probability", baseline="none")
    wanted = [
        torch.tensor([-1.0, -0.5]).exp().mean() / 3,
        torch.tensor(-2.0).exp() / 3,
        0,
        torch.tensor(-0.25).exp(),
    ]
    assert weigh_samples(samples(), arm).thought.tolist() == pytest.approx([float(w) for w in wanted])
    with pytest.raises(ValueError, match="does not weigh"):
        weigh_samples(samples(), Arm(name="a"))
