"""The recipe's engine on the weights a phase asks for: one per rank in process, or one fleet of servers for all."""

from __future__ import annotations

from megavar.phases.run import Run
from megavar.rollout.engine import Engine
from megavar.runs import Phase
from megavar.trainer.model import DTYPES


def samplers(run: Run) -> int:
    """How many ranks, from the first on, drive an engine: all of them in process, one in front of servers."""
    return run.groups.world if run.recipe.rollout.engine == "local" else 1


def engine_with(run: Run, weights: Phase) -> Engine:
    """The rank's engine, started on first use and swapped to the weights in `weights`.

    One fleet serves policy and posterior in turn: phases alternate between them and never need both at once.
    """
    # The name alone, for it is stored with each trace: a phase's hash differs between runs that do the same.
    directory, version = weights.path / "hf", weights.name
    if run.engine is None:
        run.engine = _local(run, weights) if run.recipe.rollout.engine == "local" else _sglang(run, weights)
    elif run.engine_version != version:
        run.engine.update_weights(directory, version)
    run.engine_version = version
    return run.engine


def _local(run: Run, weights: Phase) -> Engine:
    from megavar.rollout.local import LocalEngine

    return LocalEngine(
        weights.path / "hf",
        dtype=DTYPES[run.recipe.model.dtype],
        device=str(run.groups.device),
        batch_size=run.recipe.rollout.batch_size,
        version=weights.name,
    )


def _sglang(run: Run, weights: Phase) -> Engine:
    from megavar.rollout.fleet import Fleet
    from megavar.rollout.process import ServerSpec
    from megavar.rollout.servers import ExternalServers, Servers
    from megavar.rollout.sglang import SGLangEngine

    asked = run.recipe.rollout.servers
    version = weights.name
    servers: Servers
    if asked.urls:
        servers = ExternalServers(asked.urls)
        servers.update_weights(weights.path / "hf", version, asked.pause)
    else:
        servers = Fleet(
            weights.path / "hf",
            logs=run.directory.path / ".engine-logs",
            spec=ServerSpec(
                device=run.groups.device.type,
                tp=asked.tp,
                dtype=run.recipe.model.dtype,
                context_length=run.recipe.rollout.context_length,
                deterministic=asked.deterministic,
                max_running=asked.max_running,
                kv_tokens=asked.kv_tokens,
                memory_fraction=asked.memory_fraction,
            ),
            servers=asked.count,
            version=version,
            router=asked.router,
            seed=run.recipe.rollout.seed,
            venv=asked.venv,
        )
    return SGLangEngine(servers, concurrency=asked.concurrency, pause_mode=asked.pause)
