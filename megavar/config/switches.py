"""Which keys of an arm and of the posterior each objective reads; any other key that is set is a mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

_IMPORTANCE = {"importance", "importance_cap", "clip_low", "clip_high"}
_MULTI_TRACE = {"estimator", "ratio", "temper", "clip", "selection", "mix", "all_zero"}

ARM_SWITCHES: Mapping[str, frozenset[str]] = {
    "sft": frozenset(),
    "variational": frozenset(_MULTI_TRACE | {"answer"}),
    "elbo": frozenset(),
    "mixture": frozenset(_MULTI_TRACE),
    "covrl": frozenset({"kl", "ratio_clip", "answer_weight"}),
    "ravr": frozenset({"kl", "utility_weighted"}),
    "rft": frozenset({"question_weight"}),
    "reinforce": frozenset(_IMPORTANCE | {"question_weight", "reward", "baseline", "mask_open"}),
    "grpo": frozenset(_IMPORTANCE | {"question_weight", "reward", "length_norm", "mask_open"}),
    "shaped": frozenset(_IMPORTANCE | {"question_weight", "shaping", "baseline"}),
    "verifree": frozenset(_IMPORTANCE | {"question_weight", "baseline", "answer_weight"}),
    "latro": frozenset(_IMPORTANCE | {"kl", "baseline", "answer_weight"}),
    "jepo": frozenset(_IMPORTANCE | {"bound", "normalised", "answer_weight"}),
}
POSTERIOR_SWITCHES: Mapping[str, frozenset[str]] = {
    "sft": frozenset(),
    "forward_kl": frozenset(),
    "reverse_kl": frozenset({"tune", "estimator", "kl"}),
    "iwae": frozenset({"tune", "estimator"}),
    "trajectory_balance": frozenset({"tune", "estimator"}),
    "rlt": frozenset({"tune", "kl"}),
}
PROPOSED = frozenset({"variational", "elbo", "mixture"})
"""Objectives whose traces a posterior of its own proposes; of the others only `sft` samples nothing of the policy."""
_NEEDS_VALUE = {  # key -> the key and value that give it a meaning
    "temper": ("ratio", "tempered"),
    "clip": ("ratio", "clipped"),
    "clip_low": ("importance", "clipped"),
    "clip_high": ("importance", "clipped"),
}


def check_traces(arms: Iterable[Any], traces: int, posterior: Any) -> None:
    """Raise ValueError for an objective that one trace of a question gives nothing to learn from.

    arms, posterior: with the keys of `megavar.config.arm.Arm` and of `megavar.config.recipe.Posterior`.
    """
    for arm in arms:
        halves = arm.objective in ("mixture", "covrl")
        compares = arm.objective == "grpo" or (
            arm.baseline == "mean" and arm.objective in ("reinforce", "shaped")
        )
        if traces < 2 and (halves or compares):
            why = "halves them" if halves else "compares them with their mean"
            raise ValueError(
                f"arms.{arm.name}: {arm.objective} {why}: set rollout.traces to 2 or more, not {traces}"
            )
    if posterior.objective in ("trajectory_balance", "rlt") and posterior.traces < 2:
        raise ValueError(
            f"posterior: {posterior.objective} compares a question's traces: set posterior.traces to 2 or more, "
            f"not {posterior.traces}"
        )


def check_online(arm: Any, *, staleness: int) -> None:
    """Raise ValueError where rounds cannot be run with this arm.

    arm: with the keys of `megavar.config.arm.Arm`; staleness: rounds by which samples may lag.
    """
    objective: str = arm.objective
    if objective == "sft":
        raise ValueError(
            'rounds > 1 with objective = "sft": it learns the data set\'s traces, which are the same in every round'
        )
    if not staleness:
        return
    if objective in ("mixture", "ravr"):
        raise ValueError(
            f'objective = "{objective}" has no ratio for samples of an older policy: set rollout.staleness = 0'
        )
    if "importance" in ARM_SWITCHES[objective] and arm.importance == "none":
        raise ValueError(
            f'objective = "{objective}" is a gradient at the policy that samples; with rollout.staleness > 0 set '
            'importance = "token", "sequence" or "clipped"'
        )


def check_switches(
    section: BaseModel, objective: str, switches: Mapping[str, frozenset[str]], always: frozenset[str]
) -> None:
    """Raise ValueError naming the first key that is set and that the objective does not read.

    always: keys that are not switches of an objective.
    """
    for name, field in type(section).model_fields.items():
        if name in always or getattr(section, name) == field.default:
            continue
        if name not in switches[objective]:
            known = ", ".join(sorted(switches[objective])) or "none"
            raise ValueError(f'{name} has no meaning for objective = "{objective}"; its keys: {known}')
        if name in _NEEDS_VALUE:
            other, value = _NEEDS_VALUE[name]
            if getattr(section, other) != value:
                raise ValueError(f'{name} needs {other} = "{value}"')
