"""Two finished runs that the tests look at: one with every objective, one plain."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megavar.config.recipe import Arm

sys.path.insert(0, str(Path(__file__).parent))  # for small_recipe

from small_recipe import make_inputs, megavar, write_recipe  # noqa: E402

OBJECTIVES = (
    Arm(name="sft", objective="sft"),
    Arm(name="rft", objective="rft"),
    Arm(name="weighted"),
    Arm(name="paper", selection="argmax", mix=True, all_zero="original"),
    Arm(name="drawn", selection="resample", all_zero="gml"),
    Arm(name="sampled", answer="sampled", ratio="none"),
    Arm(name="likelihood", estimator="likelihood", ratio="full"),
    Arm(name="gml", estimator="gml", mix=True),
)
PLAIN = (Arm(name="rft", objective="rft"), Arm(name="acc"))


@dataclass(frozen=True, kw_only=True)
class Finished:
    recipe: Path
    path: Path
    """The run directory."""
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def objectives_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Every arm, the posterior by forward KL; the policy has learnt about half of its questions."""
    return _run(
        write_recipe(
            tmp_path_factory.mktemp("objectives") / "run.toml",
            inputs,
            arms=OBJECTIVES,
            steps=32,
            checkpoint_every=0,
            objective="forward_kl",
        )
    )


@pytest.fixture(scope="session")
def plain_run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return _run(write_recipe(tmp_path_factory.mktemp("plain") / "run.toml", inputs, arms=PLAIN))


def _run(recipe: Path) -> Finished:
    done = megavar("run", recipe)
    assert done.returncode == 0, done.stderr[-4000:]
    return Finished(recipe=recipe, path=recipe.with_suffix(""), stdout=done.stdout, stderr=done.stderr)
