"""The recipe's sampling: who samples, how much, and how weights reach the servers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megavar.config.section import Section


class Servers(Section):
    """SGLang servers, for `engine = "sglang"`."""

    urls: tuple[str, ...] = ()
    """Servers that run already; empty starts `count` of them on this machine, and stops them at the end."""
    router_url: str | None = None
    """Router in front of `urls`, which runs already; none: requests go to each server directly."""
    count: int = Field(default=1, ge=1)
    """Servers to start."""
    tp: int = Field(default=1, ge=1)
    """Tensor parallelism inside a server."""
    devices: tuple[tuple[str, ...], ...] = ()
    """Per server, GPU ids or one CPU core list for each tensor-parallel rank; empty: GPUs from 0 on."""
    router: bool = False
    """Put sglang-router in front."""
    concurrency: int = Field(default=256, ge=1)
    """Requests at the servers at once."""
    deterministic: bool = True
    """Honour the seed of each completion; without it SGLang samples faster and no run repeats."""
    pause: Literal["abort", "retract", "in_place"] = "retract"
    """What becomes of requests in flight while weights are swapped."""
    max_running: int = Field(default=64, ge=1)
    """Requests that decode at once in a server."""
    kv_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the KV cache; none: what memory allows, 16384 on a CPU."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of a GPU's memory for weights and KV cache; none: SGLang's choice."""
    venv: Path | None = None
    """Environment of the servers; none: `.venv-engine`."""
    transport: Literal["disk", "broadcast", "direct", "colocated"] = "disk"
    """How new weights reach the servers: through files, gathered and broadcast, from shard to shard, or out of the
    memory of ranks on the servers' machine."""

    @model_validator(mode="after")
    def _places(self) -> Servers:
        named = [*self.urls, *([self.router_url] if self.router_url else [])]
        if wrong := [url for url in named if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"{wrong[0]!r} is no URL of a server: it begins with http:// or https://")
        if self.router_url and not self.urls:
            raise ValueError(
                "router_url is in front of `urls`, which are missing; `router` starts one of our own"
            )
        if self.devices and [len(own) for own in self.devices] != [self.tp] * self.count:
            raise ValueError(
                f"devices must name {self.tp} for each of {self.count} servers (tp, count), got {self.devices!r}"
            )
        return self


class Rollout(Section):
    engine: Literal["local", "sglang"] = "local"
    """Who samples: in-process Hugging Face generation, or SGLang servers."""
    traces: int = Field(default=8, ge=1, le=256)
    """K: traces of the posterior per question."""
    answers: int = Field(default=8, ge=1)
    """N: answers per trace for the accuracy estimator."""
    temperature: float = Field(default=0.7, gt=0)
    """Of traces and answers alike; log-probs are scored at this temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling; 1 samples the whole distribution, which is what is scored."""
    max_thought_tokens: int = Field(default=28000, ge=1)
    """A thought cut here has no end marker: kept aside and counted."""
    max_answer_tokens: int = Field(default=4096, ge=1)
    """A sampled answer cut here counts as wrong."""
    context_length: int | None = Field(default=None, ge=1)
    """Longest prompt plus completion; None takes the model's own limit."""
    batch_size: int = Field(default=64, ge=1)
    """Sequences that the local engine decodes at once."""
    questions_per_part: int = Field(default=256, ge=1)
    """Questions in one part of the trace store: the unit of resumption."""
    servers: Servers = Servers()
    posterior_servers: Servers | None = None
    """Servers of the posterior alone; none: `servers` hold the weights of policy and posterior in turn."""
    replay_experts: bool = False
    """Of a mixture: scoring and training send each trace's tokens to the experts that the servers chose for them."""
    staleness: int = Field(default=0, ge=0)
    """Rounds by which sampled weights lag those in training, so that sampling overlaps it; 0 is synchronous."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Every sample's own seed is derived from this, its question and its index."""

    @property
    def fleets(self) -> tuple[Servers, ...]:
        """Every set of servers that is asked for."""
        return (self.servers, *([self.posterior_servers] if self.posterior_servers else []))

    @model_validator(mode="after")
    def _transports(self) -> Rollout:
        if self.engine == "local":
            if self.posterior_servers is not None:
                raise ValueError('posterior_servers needs engine = "sglang"')
            if self.servers.transport != "disk":
                raise ValueError(f'servers.transport = "{self.servers.transport}" needs engine = "sglang"')
            if self.replay_experts:
                raise ValueError(
                    'replay_experts needs engine = "sglang": the local engine records no experts'
                )
        return self
