"""`megavar launch`: a recipe as a Slurm job."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from megavar.cluster.job import Job, render
from megavar.cluster.sweep import expand
from megavar.config.load import dump_recipe
from megavar.config.recipe import Recipe
from megavar.errors import UserError
from megavar.files import write_atomically

JOBS = ".slurm"
"""Within the run directory: the script, the recipes it runs and its logs."""


def run(args: argparse.Namespace) -> int:
    """Render the job and submit it, or print it. Raises UserError for what cannot become a job."""
    base, recipes = expand(args.recipe, args.overrides, args.sweep)
    job = job_of(base, len(recipes), args)
    recipes = [_with_ranks(recipe, job) for recipe in recipes]
    script = render(job)
    if args.dry_run:
        print(script, end="")
        return 0
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            "sbatch is not on this machine; run this on a login node, or add --dry-run for the script"
        )
    from megavar import preflight

    for recipe in recipes:
        preflight.check(recipe, here=False)
    _write(job, script, recipes)
    done = subprocess.run(
        [sbatch, "--parsable", str(job.directory / "job.sbatch")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"sbatch refused {job.directory / 'job.sbatch'}: {done.stderr.strip()}")
    print(done.stdout.strip().partition(";")[0])
    print(f"logs: {job.directory}", file=sys.stderr)
    return 0


def job_of(recipe: Recipe, tasks: int, args: argparse.Namespace) -> Job:
    """The job of `tasks` runs of a recipe. Raises UserError where nodes, GPUs and recipe do not fit together."""
    if args.engine_nodes >= args.nodes:
        raise UserError(
            f"--engine-nodes {args.engine_nodes}: leave at least one of the {args.nodes} nodes to the trainer"
        )
    served = recipe.rollout.engine == "sglang"
    if args.engine_nodes and not served:
        raise UserError("--engine-nodes: the recipe samples in the trainer; set --rollout.engine sglang")
    own = recipe.rollout.posterior_servers is not None
    if args.posterior_nodes and not own:
        raise UserError("--posterior-nodes: the recipe has no rollout.posterior_servers")
    if args.posterior_nodes and args.posterior_nodes >= args.engine_nodes:
        raise UserError(
            f"--posterior-nodes {args.posterior_nodes}: leave at least one of the {args.engine_nodes} engine nodes to "
            "the policy's servers"
        )
    policy_nodes = (args.engine_nodes or args.nodes) - args.posterior_nodes
    ranks = args.ranks_per_node or max(1, args.gpus_per_node)
    if args.gpus_per_node and ranks > args.gpus_per_node:
        raise UserError(
            f"--ranks-per-node {ranks}: a rank needs a GPU of its own, a node has {args.gpus_per_node}"
        )
    return Job(
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", recipe.name),
        directory=recipe.out / JOBS,
        nodes=args.nodes,
        engine_nodes=args.engine_nodes,
        gpus_per_node=args.gpus_per_node,
        ranks_per_node=ranks,
        servers_per_node=_servers_per_node(recipe, "servers", policy_nodes, args) if served else 0,
        posterior_nodes=args.posterior_nodes,
        posterior_servers_per_node=(
            _servers_per_node(recipe, "posterior_servers", args.posterior_nodes or policy_nodes, args)
            if own
            else 0
        ),
        tasks=tasks,
        at_once=args.at_once or 0,
        partition=args.partition,
        account=args.account,
        time=args.time,
        options=tuple(args.sbatch),
        image=args.image,
        engine_image=args.engine_image or (args.image if served else ""),
        mounts=tuple(args.mount),
        interface=args.interface,
        environment=dict(_variable(text) for text in args.env),
        grace=args.grace,
    )


def _servers_per_node(recipe: Recipe, section: str, nodes: int, args: argparse.Namespace) -> int:
    """Of the fleet that `rollout.<section>` asks for, on `nodes` nodes."""
    servers = getattr(recipe.rollout, section)
    name = f"rollout.{section}"
    if servers.urls:
        raise UserError(f"{name}.urls: the job starts its own servers; unset it: --{name}.urls '[]'")
    if not args.gpus_per_node:
        return -(-servers.count // nodes)
    if servers.tp > args.gpus_per_node:
        raise UserError(
            f"{name}.tp = {servers.tp}: a server lies on one node, which has {args.gpus_per_node} GPUs"
        )
    if servers.memory_fraction is None:
        if not args.engine_nodes:
            raise UserError(
                f"servers share the trainer's GPUs: set --{name}.memory_fraction (0.3, say), or --engine-nodes"
            )
        if recipe.rollout.posterior_servers is not None and not args.posterior_nodes:
            raise UserError(
                f"the servers of policy and posterior share GPUs: set --{name}.memory_fraction (0.4, say), or "
                "--posterior-nodes, of the engine nodes"
            )
    return args.gpus_per_node // servers.tp


def _with_ranks(recipe: Recipe, job: Job) -> Recipe:
    """The recipe with as many ranks as the job starts. Raises UserError where its layout does not divide them."""
    ranks = job.trainer_nodes * job.ranks_per_node
    trainer = recipe.trainer.model_dump()
    try:
        changed = type(recipe.trainer).model_validate({**trainer, "ranks": ranks})
    except ValidationError as error:
        raise UserError(
            f"{job.trainer_nodes} nodes with {job.ranks_per_node} ranks each: {_reason(error)}"
        ) from None
    return recipe.model_copy(update={"trainer": changed})


def _reason(error: ValidationError) -> str:
    return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())


def _write(job: Job, script: str, recipes: Sequence[Recipe]) -> None:
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
        for index, recipe in enumerate(recipes):
            name = f"recipe-{index}.toml" if job.tasks > 1 else "recipe.toml"
            write_atomically(job.directory / name, dump_recipe(recipe))
        write_atomically(job.directory / "job.sbatch", script)
    except OSError as error:
        raise UserError(f"{job.directory}: cannot write to it: {error.strerror}; set --out") from None


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--env {text}: expected NAME=VALUE")
    return name, value
