"""A run killed in one phase after another ends with the same bytes as one that never was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from killing import comparable, has_checkpoint, has_part, kill_when, started
from small_recipe import megavar, results

from megavar.metrics import read_metrics

# One phase of each kind, in the order of the run; where there are parts or checkpoints, between two of them.
KILLS = (
    ("initial/data", started),
    ("initial/fit", has_checkpoint),
    ("proposals/traces", has_part),
    ("proposals/policy_scores", has_part),
    ("proposals/verdicts", has_part),
    ("arms/acc/data", started),
    ("arms/acc/fit", has_checkpoint),
)


@pytest.fixture(scope="module")
def killed(plain_run, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run again, killed on the way."""
    recipe = tmp_path_factory.mktemp("killed") / "run.toml"
    text = plain_run.recipe.read_text().replace(str(plain_run.path), str(recipe.with_suffix("")))
    recipe.write_text(text)
    run = recipe.with_suffix("")
    hits = {phase: kill_when(recipe, run / phase, ready) for phase, ready in KILLS}
    # A phase may outrun the killer now and then; if most do, this tests nothing.
    assert list(hits.values()).count("inside") >= len(KILLS) - 3, hits
    done = megavar("run", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == plain_run.stdout
    return run


def test_same_bytes(plain_run, killed: Path) -> None:
    wanted, found = results(plain_run.path), results(killed)
    assert len(wanted) > 40 and wanted.keys() == found.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []


def test_same_counts_and_metrics(plain_run, killed: Path) -> None:
    def manifests(run: Path) -> dict[str, dict]:
        found = (json.loads(p.read_text()) for p in run.rglob("manifest.json"))
        return {m["phase"]: comparable(m) for m in found}

    assert manifests(killed) == manifests(plain_run.path)


def test_metrics_hold_each_step_once(plain_run, killed: Path) -> None:
    def lines(run: Path) -> dict[tuple[str, int], dict]:
        found = list(read_metrics(run / "metrics.jsonl"))
        keyed = {(line["phase"], line["step"]): line for line in found}
        assert len(keyed) == len(found)
        return keyed

    wanted, found = lines(plain_run.path), lines(killed)
    # A kill between a manifest and its line in the metrics file costs the line; the manifest has the values.
    assert found.keys() <= wanted.keys() and len(found) >= len(wanted) - 2
    for key, line in found.items():
        if "train/loss" in line:
            assert line["train/loss"] == wanted[key]["train/loss"]
            assert line["train/grad_norm"] == wanted[key]["train/grad_norm"]


def test_nothing_of_the_kills_is_left(killed: Path) -> None:
    names = [p.name for p in killed.rglob("*")]
    assert not [n for n in names if n.endswith((".tmp", ".partial", ".replaced")) or n == ".checkpoints"]
