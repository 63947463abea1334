"""Can this recipe run here: its files, its processes against the GPUs, its disk."""

from __future__ import annotations

from megavar import preflight
from megavar.config.recipe import Recipe
from megavar.doctor.check import Check, Status
from megavar.doctor.engine import check_engine_environment, check_servers
from megavar.doctor.machine import check_disk
from megavar.doctor.software import installed
from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.plan.activations import Stack
from megavar.plan.plan import make_plan
from megavar.plan.request import request_of
from megavar.plan.search import cheapest_fit
from megavar.plan.show import verdict

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_recipe(recipe: Recipe, *, nodes: int, gpus: int, gpu_bytes: int) -> list[Check]:
    """nodes: that the trainer's ranks are spread over. gpus: of this one. gpu_bytes: of the smallest of them."""
    servers = recipe.rollout.servers
    here = recipe.rollout.engine == "sglang" and not servers.urls
    checks = [_inputs(recipe), check_processes(recipe, nodes=nodes, gpus=gpus)]
    if checks[0].status == "ok":
        checks += check_disk(recipe.out, needed=bytes_on_disk(recipe))
        if gpu_bytes:
            checks.append(check_memory(recipe, gpu_bytes))
    checks.append(check_engine_environment(servers.venv, needed=here, gpus=gpus > 0))
    if recipe.rollout.engine == "sglang":
        urls = [url for fleet in recipe.rollout.fleets for url in fleet.urls]
        checks += check_servers(urls, experts=recipe.rollout.replay_experts)
    return checks


def _inputs(recipe: Recipe) -> Check:
    name = "model, data, layout"
    try:
        preflight.check(recipe)
    except UserError as error:
        return Check(
            group="recipe", name=name, status="fail", found="not as the recipe needs them", fix=str(error)
        )
    return Check(
        group="recipe", name=name, status="ok", found=f"{recipe.model.path} and the questions fit the recipe"
    )


def check_processes(recipe: Recipe, *, nodes: int, gpus: int) -> Check:
    """A rank needs a GPU of its own where there are any; so do servers, which share them with the trainer."""
    ranks = recipe.trainer.ranks
    local = -(-ranks // nodes)
    found = f"{ranks} on {nodes} node{'s' * (nodes > 1)}, {gpus} GPU{'s' * (gpus != 1)} here"
    fix = ""
    servers = recipe.rollout.servers
    if ranks % nodes:
        fix = f"--trainer.ranks {local * nodes}: as many on every node"
    elif gpus and local > gpus:
        fix = f"--trainer.ranks {gpus * nodes}, or more nodes: a rank needs a GPU of its own"
    elif (
        gpus and recipe.rollout.engine == "sglang" and not servers.urls and servers.count * servers.tp > gpus
    ):
        wanted = f"{servers.count} servers of {servers.tp} GPUs"
        fix = f"{wanted} do not fit: --rollout.servers.count {max(1, gpus // servers.tp)}, or servers elsewhere by URL"
    return Check(group="recipe", name="ranks", status="fail" if fix else "ok", found=found, fix=fix)


def check_memory(recipe: Recipe, gpu_bytes: int) -> Check:
    """The plan of `megavar plan`, on GPUs of `gpu_bytes`."""
    stack: Stack = "torch" if installed("transformer-engine") is None else "transformer-engine"
    plan = make_plan(request_of(recipe, gpu_gib=gpu_bytes / 2**30, stack=stack))
    found, *fix = verdict(plan, None if plan.fits else cheapest_fit(plan))
    status: Status = "ok" if plan.fits else "fail"
    return Check(group="recipe", name="GPU memory", status=status, found=found, fix="; ".join(fix))


def bytes_on_disk(recipe: Recipe) -> int:
    """At most: the weights of every fit, and the newest checkpoints with float32 master weights and moments.

    Traces are left out: they are small beside the weights.
    """
    stored = sum(file.stat().st_size for file in recipe.model.path.glob("*.safetensors"))
    parameters = stored // _DTYPE_BYTES[read_architecture(recipe.model.path).dtype]
    own = _DTYPE_BYTES[recipe.model.dtype]
    fits = (recipe.initial, recipe.posterior.fit, recipe.final)
    # One more than stay: an old checkpoint is there until the next one is complete. Those of a fit go with its end.
    checkpoints = 1 + max(fit.checkpoint_keep for fit in fits)
    return parameters * ((2 + len(recipe.arms)) * own + checkpoints * (own + 12))
