"""The recipe's engines: one per rank in process, or fleets of servers that one rank drives."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from megavar.config import rollout as config
from megavar.config.recipe import Recipe
from megavar.data.routes import RouteShape
from megavar.models.architecture import read_architecture
from megavar.rollout.engine import Engine
from megavar.rollout.roles import RoleEngines, Start
from megavar.trainer.model import DTYPES


def role_engines(recipe: Recipe, device: torch.device, logs: Path) -> RoleEngines:
    """Engines of policy and posterior: one for both, which swaps, unless the posterior has servers of its own.

    logs: directory for those of the servers.
    """
    rollout = recipe.rollout
    policy: Start
    if rollout.engine == "local":
        policy = partial(_local, recipe, device)
    else:
        policy = partial(_sglang, recipe, rollout.servers, device, logs)
    posterior = policy
    if rollout.posterior_servers is not None:
        posterior = partial(_sglang, recipe, rollout.posterior_servers, device, logs / "posterior")
    return RoleEngines({"policy": policy, "posterior": posterior})


def _local(recipe: Recipe, device: torch.device, weights: Path, version: str) -> Engine:
    from megavar.rollout.local import LocalEngine

    return LocalEngine(
        weights,
        dtype=DTYPES[recipe.model.dtype],
        device=str(device),
        batch_size=recipe.rollout.batch_size,
        version=version,
    )


def _sglang(
    recipe: Recipe,
    asked: config.Servers,
    device: torch.device,
    logs: Path,
    weights: Path,
    version: str,
) -> Engine:
    from megavar.rollout.fleet import Fleet
    from megavar.rollout.process import ServerSpec
    from megavar.rollout.servers import ExternalServers, Servers
    from megavar.rollout.sglang import SGLangEngine

    servers: Servers
    if asked.urls:
        servers = ExternalServers(asked.urls, router=asked.router_url)
        if asked.transport == "disk":  # the others push: the servers may not see our files
            servers.update_weights(weights, version, asked.pause)
    else:
        servers = Fleet(
            weights,
            logs=logs,
            spec=ServerSpec(
                device=device.type,
                tp=asked.tp,
                dtype=recipe.model.dtype,
                context_length=recipe.rollout.context_length,
                deterministic=asked.deterministic,
                max_running=asked.max_running,
                kv_tokens=asked.kv_tokens,
                memory_fraction=asked.memory_fraction,
                return_experts=recipe.rollout.replay_experts,
            ),
            servers=asked.count,
            devices=asked.devices,
            version=version,
            router=asked.router,
            seed=recipe.rollout.seed,
            venv=asked.venv,
        )
    architecture = read_architecture(weights)
    routes = RouteShape(
        layers=architecture.num_layers,
        experts_per_token=architecture.experts_per_token,
        num_experts=architecture.num_experts,
    )
    return SGLangEngine(
        servers,
        concurrency=asked.concurrency,
        routes=routes if architecture.is_moe else None,
        pause_mode=asked.pause,
    )
