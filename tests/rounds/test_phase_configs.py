"""What a phase's hash is made of: a key that changes results starts the phases anew that it changes, and no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from small_recipe import write_recipe

from megavar.config import schema
from megavar.config.diff import NEUTRAL_KEYS, NEUTRAL_LEAVES
from megavar.config.load import load_recipe
from megavar.config.recipe import Arm, Recipe
from megavar.errors import UserError
from megavar.phases.run import OpenPhase
from megavar.phases.walk import Walk
from megavar.rounds import every_round
from megavar.runs import Phase

Options = list[tuple[str, str]]
TEMPLATE = "templates.custom.with_answer"
OTHER_PROMPT = "{question} It is {solution}.\n"
OF_CONTENTS = ("data.", "model.", "templates.policy", "templates.posterior")
"""Phases hash what questions, model files and templates say, wherever the recipe found them."""
OF_SERVERS = ("rollout.servers.", "rollout.posterior_servers.")
"""Who samples, and not what."""


class Hashes(Walk):
    """A hash of what each phase's own hash is made of."""

    def __init__(self, recipe: Recipe) -> None:
        self.found: dict[str, str] = {}
        super().__init__(recipe)

    @contextmanager
    def phase(
        self, name: str, *, config: Mapping[str, Any], inputs: Sequence[Phase] = ()
    ) -> Iterator[OpenPhase]:
        said = json.dumps([config, [self.found[phase.name] for phase in inputs]], sort_keys=True)
        self.found[name] = hashlib.sha256(said.encode()).hexdigest()
        with super().phase(name, config=config, inputs=inputs) as opened:
            yield opened


def hashes(recipe: Path, options: Options) -> dict[str, str]:
    walk = Hashes(load_recipe(recipe, options))
    every_round(walk)
    return walk.found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe in which nearly every key has a meaning for some arm; nothing is run."""
    path = tmp_path_factory.mktemp("configs")
    arms = (
        Arm(name="weighed", ratio="tempered", all_zero="gml"),
        Arm(name="clipped", ratio="clipped"),
        Arm(name="covrl", objective="covrl"),
        Arm(name="ravr", objective="ravr"),
        Arm(name="grpo", objective="grpo", importance="clipped"),
        Arm(name="reinforce", objective="reinforce", importance="token"),
        Arm(name="shaped", objective="shaped"),
        Arm(name="jepo", objective="jepo"),
    )
    return write_recipe(path / "run.toml", path, arms=arms, objective="reverse_kl")


def others(annotation: Any, value: Any) -> list[str]:
    """Further values of a key, as text for the command line."""
    bare, _ = schema.optional(annotation)
    if get_origin(bare) is Literal:
        return [str(choice) for choice in get_args(bare) if choice != value]
    if get_origin(bare) is tuple:
        kind = get_args(bare)[0]
        return ["['a']"] if kind is str else [json.dumps([0.5 * v for v in value])]
    if get_origin(bare) is dict:
        return ["{ fp8 = 'hybrid' }"]
    if bare is bool:
        return [str(not value).lower()]
    if bare is int:
        return [str((value or 7) + 1)]
    return [str((value or 1e-7) * 0.5) if bare is float else f"{value or ''}x"]


def at(recipe: Recipe, dotted: str) -> Any:
    node: Any = recipe
    for part in dotted.split("."):
        if isinstance(node, tuple):
            node = node[int(part)]
        else:
            node = node.get(part) if isinstance(node, Mapping) else getattr(node, part, None)
    return node


def test_every_key_that_changes_results_is_in_a_hash(recipe: Path) -> None:
    loaded, before = load_recipe(recipe), hashes(recipe, [])
    silent, untried = [], []
    for key in schema.keys():
        leaf = key.dotted.rpartition(".")[2]
        if key.dotted.split(".")[0] in NEUTRAL_KEYS or leaf in NEUTRAL_LEAVES:
            continue
        if key.dotted.startswith((*OF_CONTENTS, *OF_SERVERS)):
            continue
        places = [key.dotted.replace("custom.NAME", "custom.with_answer")]
        if ".N." in key.dotted:
            places = [key.dotted.replace(".N.", f".{n}.") for n in range(len(loaded.arms))]
        tried, changed = False, False
        for place, value in ((p, v) for p in places for v in others(schema.at(p.split(".")), at(loaded, p))):
            try:
                changed = hashes(recipe, [(place, value)]) != before
            except UserError:  # of another objective, or it needs a second key
                continue
            tried = True
            if changed:
                break
        if not changed:
            (silent if tried else untried).append(key.dotted)
    assert silent == []
    # Keys of online rounds and of servers, and markers that both templates share.
    assert set(untried) == {
        "rounds",
        "rollout.replay_experts",
        "rollout.staleness",
        "templates.custom.NAME.thought_end",
    }


@pytest.mark.parametrize(
    ("key", "value", "anew", "kept"),
    [
        (
            f"{TEMPLATE}.prompt",
            OTHER_PROMPT,
            {"posterior/data", "own/prompted_scores", "prompted/traces", "arms/covrl/data"},
            {"initial/fit", "own/traces", "own/policy_scores", "own/verdicts", "arms/grpo/fit"},
        ),
        (
            "rollout.temperature",
            "0.5",
            {"proposals/traces", "own/policy_scores"},
            {"initial/fit", "posterior/fit", "eval/initial/traces"},
        ),
        ("trainer.expert_balance", "0.1", {"initial/fit", "posterior/fit"}, {"initial/data"}),
        ("arms.grpo.clip_high", "0.3", {"arms/grpo/data"}, {"arms/covrl/data", "own/sample_scores"}),
        ("diagnostics.leak_ngram", "5", {"arms/weighed/data"}, {"arms/grpo/data", "posterior/fit"}),
        ("evaluate.seed", "5", {"eval/initial/traces", "eval/grpo/traces"}, {"arms/grpo/fit"}),
    ],
)
def test_a_key_starts_anew_what_it_changes(
    key: str, value: str, anew: set[str], kept: set[str], recipe: Path
) -> None:
    before, after = hashes(recipe, []), hashes(recipe, [(key, value)])
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert anew <= changed and not kept & changed, changed
