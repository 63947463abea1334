"""What a batch job runs beside the trainer: the servers of a node, or the router in front of all of them.

`python -m megavar.cluster.serve engines RECIPE ...` and `... router RECIPE ...` serve until SIGTERM. A server or
router that dies ends the whole process with status 1: only the trainer knows which weights a server must come
back with, so the job starts again from what the run directory holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from megavar.config.load import load_recipe
from megavar.config.recipe import Recipe
from megavar.config.rollout import Servers
from megavar.doctor.engine import serves
from megavar.errors import UserError
from megavar.rollout.control import EngineError
from megavar.rollout.engine_env import detect_kind, engine_python
from megavar.rollout.fleet import Fleet
from megavar.rollout.process import ServerSpec
from megavar.rollout.router import Router

POLL_SECONDS = 1.0
BASE_VERSION = "base"
"""Version of the weights that servers start with, until the run gives them others."""


def server_spec(recipe: Recipe, asked: Servers) -> ServerSpec:
    """What the recipe asks of every server of one fleet."""
    return ServerSpec(
        device="cuda" if detect_kind() == "gpu" else "cpu",
        tp=asked.tp,
        dtype=recipe.model.dtype,
        context_length=recipe.rollout.context_length,
        deterministic=asked.deterministic,
        max_running=asked.max_running,
        kv_tokens=asked.kv_tokens,
        memory_fraction=asked.memory_fraction,
    )


def fleet_of(recipe: Recipe, *, posterior: bool) -> Servers:
    """Raises UserError where the posterior has no servers of its own."""
    if not posterior:
        return recipe.rollout.servers
    if recipe.rollout.posterior_servers is None:
        raise UserError("rollout.posterior_servers: the recipe has none")
    return recipe.rollout.posterior_servers


def serve_engines(
    recipe: Recipe,
    *,
    posterior: bool,
    host: str,
    port: int,
    servers: int,
    node: int,
    logs: Path,
    ended: threading.Event,
) -> None:
    """Servers at ports `port`, `port` + 1, ... until `ended`. Raises EngineError when one dies."""
    asked = fleet_of(recipe, posterior=posterior)
    fleet = Fleet(
        recipe.model.path,
        logs=logs / f"engine-{'posterior-' if posterior else ''}{node}",
        spec=server_spec(recipe, asked),
        servers=servers,
        version=BASE_VERSION,
        host=host,
        ports=range(port, port + servers),
        # Without deterministic mode a server draws from its seed alone; the fleet tells its own ones apart.
        seed=recipe.rollout.seed + 100_000 * node + 50_000 * posterior,
        max_deaths=0,
        venv=asked.venv,
    )
    try:
        for url in fleet.servers():
            print(f"{url} serves {recipe.model.path}", flush=True)
        while not ended.wait(POLL_SECONDS):
            if len(fleet.servers()) < servers:
                raise EngineError("a server died; its last lines are above")
    finally:
        fleet.close()


def serve_router(
    recipe: Recipe,
    *,
    posterior: bool,
    host: str,
    port: int,
    urls: list[str],
    logs: Path,
    ended: threading.Event,
) -> None:
    """A router in front of servers that run, or will: the gate gives those that never do their time limit."""
    waiting = list(urls)
    while waiting := [url for url in waiting if not serves(url)]:
        if ended.wait(POLL_SECONDS):
            return
    venv = fleet_of(recipe, posterior=posterior).venv
    router = Router(engine_python(venv), logs / "posterior" if posterior else logs, host, port=port)
    try:
        for url in urls:
            router.add(url)
        print(f"{router.url} routes to {', '.join(urls)}", flush=True)
        while not ended.wait(POLL_SECONDS):
            router.require_alive()
    finally:
        router.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve until SIGTERM.", allow_abbrev=False)
    parser.add_argument("role", choices=("engines", "router"))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument(
        "--port", type=int, required=True, help="first of the servers' ports, or the router's"
    )
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--node", type=int, default=0, help="of the engine nodes, this one's number")
    parser.add_argument("--posterior", action="store_true", help="the posterior's own servers")
    parser.add_argument("--urls", type=json.loads, default=[], help="JSON list, for the router")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        recipe = load_recipe(args.recipe)
        own = {"host": args.host, "port": args.port, "logs": args.logs, "ended": ended}
        own["posterior"] = args.posterior
        if args.role == "engines":
            serve_engines(recipe, servers=args.servers, node=args.node, **own)
        else:
            serve_router(recipe, urls=args.urls, **own)
    except (UserError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
