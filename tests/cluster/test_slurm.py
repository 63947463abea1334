"""Jobs under a real Slurm: two nodes, pre-emption, sweeps, the gate, servers on nodes of their own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import has_checkpoint, has_part
from small_recipe import command, results, write_recipe

from megavar.config.recipe import Arm

pytestmark = pytest.mark.slurm
ARMS = (Arm(name="acc"),)
SURE = (Arm(name="gml", estimator="gml"),)
"""Weighs every trace, however little the policy has learnt."""
ON_CPUS = ("--gpus-per-node", 0, "--grace", 60)


def submit(cluster, recipe: Path, *words: object) -> str:
    """The job's id."""
    done = cluster.run(*command("launch", recipe, *ON_CPUS, *words))
    assert done.stderr == f"logs: {recipe.with_suffix('') / '.slurm'}\n"
    return done.stdout.strip()


def logs(recipe: Path, job: str = "") -> str:
    """Everything that the job said, for a failed assertion."""
    found = sorted(recipe.with_suffix("").rglob(f".slurm/**/*{job}*.log" if job else ".slurm/**/*.log"))
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in found)


def until(ready: Callable[[], bool], cluster, job: str, recipe: Path, seconds: float = 2400) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), logs(recipe)
        assert time.monotonic() < deadline, logs(recipe)
        time.sleep(0.1)


def test_preempted_job_goes_on_and_ends_with_the_same_bytes(cluster, inputs: Path, tmp_path: Path) -> None:
    """Two jobs of two nodes side by side; one is told to make room in the middle of a fit."""
    quiet, disturbed = (
        write_recipe(tmp_path / f"{name}.toml", inputs, arms=ARMS, steps=20)
        for name in ("quiet", "disturbed")
    )
    jobs = {recipe: submit(cluster, recipe, "--nodes", 2) for recipe in (quiet, disturbed)}
    fit = disturbed.with_suffix("") / "initial" / "fit"
    until(lambda: has_checkpoint(fit), cluster, jobs[disturbed], disturbed)
    assert not (fit / "manifest.json").exists()
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[disturbed])
    for recipe, job in jobs.items():
        assert cluster.wait(job) == "COMPLETED", logs(recipe)
    assert cluster.restarts(jobs[quiet]) == 0 and cluster.restarts(jobs[disturbed]) == 1

    wanted, found = results(quiet.with_suffix("")), results(disturbed.with_suffix(""))
    assert len(wanted) > 20 and wanted.keys() == found.keys()
    assert [name for name in wanted if wanted[name] != found[name]] == []

    folder = disturbed.with_suffix("") / ".slurm"
    told = (folder / f"job-{jobs[disturbed]}.log").read_text()
    assert "pre-empted: stopping" in told and told.count("back to the queue") == 1
    roles = {path.name: path.read_text() for path in (folder / jobs[disturbed]).iterdir()}
    assert roles.keys() == {"gate.log", "trainer.log"}
    assert roles["gate.log"].count("2 on 2 nodes") == 4  # on both nodes, before each of the two starts
    assert "0: initial/fit" in roles["trainer.log"]


def test_sweep_is_an_array_of_runs(cluster, inputs: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run.toml", inputs, arms=SURE, steps=4)
    job = submit(cluster, recipe, "--nodes", 1, "--sweep", "final.lr=1e-3,2e-3")
    for task in (0, 1):
        assert cluster.wait(f"{job}_{task}") == "COMPLETED", logs(recipe)
    runs = {lr: recipe.with_suffix("") / f"final.lr={lr}" for lr in ("1e-3", "2e-3")}
    weights = [(run / "arms/gml/fit/hf/model.safetensors").read_bytes() for run in runs.values()]
    assert all((run / "table.json").exists() for run in runs.values()) and weights[0] != weights[1]


def test_a_node_that_cannot_run_the_recipe_ends_the_job(cluster, inputs: Path, tmp_path: Path) -> None:
    own = shutil.copytree(inputs, tmp_path / "inputs")
    recipe = write_recipe(tmp_path / "run.toml", own, arms=ARMS)
    job = submit(cluster, recipe, "--nodes", 1, "--sbatch=--hold")
    (own / "model" / "config.json").unlink()
    cluster.run("scontrol", "release", job)
    assert cluster.wait(job) == "FAILED"
    folder = recipe.with_suffix("") / ".slurm"
    assert "a node cannot run the recipe" in (folder / f"job-{job}.log").read_text()
    assert f"{own}/model/config.json does not exist" in (folder / job / "gate.log").read_text()
    assert not (folder / job / "trainer.log").exists()


@pytest.mark.engine
def test_servers_on_their_own_nodes_and_the_loss_of_one(cluster, inputs: Path, tmp_path: Path) -> None:
    """One node trains, two sample the policy behind a router, one the posterior; a server is killed meanwhile."""
    recipe = write_recipe(tmp_path / "run.toml", inputs, arms=SURE, steps=4)
    sampling: list[object] = ["--rollout.engine", "sglang", "--rollout.questions_per_part", 4]
    for fleet, count in (("servers", 2), ("posterior_servers", 1)):
        sampling += [f"--rollout.{fleet}.count", count, f"--rollout.{fleet}.concurrency", 2]
    job = submit(cluster, recipe, "--nodes", 4, "--engine-nodes", 3, "--posterior-nodes", 1, *sampling)
    traces = recipe.with_suffix("") / "proposals" / "traces"
    until(lambda: has_part(traces), cluster, job, recipe)
    next(p for p in cluster.processes() if "sglang.launch_server" in p.cmdline()).kill()
    until(lambda: cluster.restarts(job) == 1, cluster, job, recipe)
    assert cluster.wait(job) == "COMPLETED", logs(recipe)
    folder = recipe.with_suffix("") / ".slurm"
    assert "lost a server" in (folder / f"job-{job}.log").read_text()
    names = (
        "engine-0",
        "engine-1",
        "router",
        "engine-posterior-0",
        "engine-posterior-router",
        "gate",
        "trainer",
    )
    assert {f"{name}.log" for name in names} <= {path.name for path in (folder / job).glob("*.log")}
