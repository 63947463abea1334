"""What is to be planned: a recipe's model, layout and work, and the GPUs it is to run on."""

from __future__ import annotations

from dataclasses import dataclass

from megavar.config.recipe import Arm, Fit, Recipe
from megavar.config.rollout import Servers
from megavar.errors import UserError
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.parallel_layout import ParallelLayout
from megavar.objectives.registry import OBJECTIVES, needs_of
from megavar.plan.activations import Operators, Stack

PROMPT_TOKENS = 1024
"""Assumed longest prompt, markers included."""
GPUS_PER_NODE = 8
ITEM = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitWork:
    """One training phase."""

    name: str
    examples: int
    """In an optimizer step, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWork:
    """What samples traces, and what it takes of the trainer's GPUs."""

    kind: str
    """"local" or "sglang"."""
    count: int
    tp: int
    running: int
    """Sequences that decode at once in one of them."""
    shares_gpus: bool
    """Its weights stay on the trainer's GPUs while the trainer works."""
    kv_tokens: int | None = None
    memory_fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything the plan follows from; tokens are counted per sequence unless it says otherwise."""

    architecture: Architecture
    layout: ParallelLayout
    operators: Operators
    packing: bool
    tokens_per_micro_batch: int
    scoring_tokens_per_micro_batch: int
    longest: int
    """Longest training or scoring example, prompt included."""
    mean: int
    """Mean example, prompt included."""
    fits: tuple[FitWork, ...]
    engines: tuple[EngineWork, ...]
    """That of the policy first, the posterior's last; often the same."""
    traces: int
    """K."""
    answers: int
    """N, 0 where no arm needs sampled answers."""
    answer_tokens: int
    """Mean sampled answer."""
    gpu_bytes: int
    gpus_per_node: int = GPUS_PER_NODE

    @property
    def shares_gpus(self) -> bool:
        return any(engine.shares_gpus for engine in self.engines)

    @property
    def training_tokens(self) -> int:
        """Of the largest training micro-batch: an example longer than the budget has one to itself."""
        return max(self.tokens_per_micro_batch, self.longest) if self.packing else self.longest

    @property
    def scoring_tokens(self) -> int:
        """Of the largest scoring micro-batch."""
        return max(self.scoring_tokens_per_micro_batch, self.longest) if self.packing else self.longest

    def micro_batches(self, fit: FitWork) -> int:
        """Of one data-parallel rank in a step; a multiple of pp where the schedule interleaves."""
        examples = -(-fit.examples // self.layout.dp)
        count = -(-examples * self.mean // self.training_tokens) if self.packing else examples
        group = self.layout.pp if self.layout.vpp > 1 else 1
        return -(-count // group) * group


def request_of(
    recipe: Recipe,
    *,
    gpu_gib: float,
    stack: Stack,
    longest: int | None = None,
    mean: int | None = None,
) -> Request:
    """longest, mean: tokens of a training example; from the recipe's limits where None.

    Raises UserError: no readable model, a layout the model cannot be split into or trained under, lengths that
    contradict.
    """
    trainer, rollout = recipe.trainer, recipe.rollout
    architecture = read_architecture(recipe.model.path)
    layout = trainer.layout
    architecture.check_layout(layout)
    architecture.check_training(layout, sequence_parallel=trainer.sequence_parallel)
    context = min(architecture.max_positions, rollout.context_length or architecture.max_positions)
    if longest is not None and longest > context:
        raise UserError(f"--longest {longest} is more than the context of {context} tokens; leave it out")
    longest = longest or min(context, PROMPT_TOKENS + rollout.max_thought_tokens + rollout.max_answer_tokens)
    mean = mean or max(1, longest // 2)
    if mean > longest:
        raise UserError(
            f"--mean {mean} is more than the longest example of {longest} tokens; raise --longest"
        )
    return Request(
        architecture=architecture,
        layout=layout,
        operators=Operators(
            stack=stack,
            device="cuda",
            item=ITEM[recipe.model.dtype],
            sequence_parallel=trainer.sequence_parallel,
            recompute=trainer.recompute,
            fp8=bool(trainer.megatron.get("fp8")),
        ),
        packing=trainer.packing,
        tokens_per_micro_batch=trainer.training_budget,
        scoring_tokens_per_micro_batch=trainer.scoring_budget,
        longest=longest,
        mean=mean,
        fits=_fits(recipe),
        engines=_engines(recipe),
        traces=rollout.traces,
        answers=rollout.answers if "answers" in needs_of(recipe.arms) else 0,
        answer_tokens=min(rollout.max_answer_tokens, PROMPT_TOKENS),
        gpu_bytes=int(gpu_gib * 2**30),
    )


def _fits(recipe: Recipe) -> tuple[FitWork, ...]:
    posterior = recipe.posterior
    first = posterior.traces if posterior.objective == "forward_kl" else 1
    fits = [_fit("initial", recipe.initial, 1), _fit("posterior", posterior.fit, first)]
    if posterior.objective not in ("sft", "forward_kl"):
        fits.append(_fit("posterior, own traces", posterior.tune, posterior.traces))
    fits += [_fit(f"arm {arm.name}", recipe.final, _examples(arm, recipe)) for arm in recipe.arms]
    return tuple(fits)


def _fit(name: str, fit: Fit, per_question: int) -> FitWork:
    return FitWork(name=name, examples=fit.questions_per_step * per_question)


def _examples(arm: Arm, recipe: Recipe) -> int:
    """Of a question, at most."""
    kind, traces = OBJECTIVES[arm.objective].kind, recipe.rollout.traces
    if kind == "dataset":
        return 1
    if kind == "two_prompts":
        return 2 * traces
    chosen = traces if arm.selection == "weighted" else 1
    return chosen + (1 if arm.mix else 0)


def _engines(recipe: Recipe) -> tuple[EngineWork, ...]:
    rollout, ranks = recipe.rollout, recipe.trainer.ranks
    if rollout.engine == "local":
        alone = EngineWork(kind="local", count=ranks, tp=1, running=rollout.batch_size, shares_gpus=True)
        return (alone,)
    return tuple(_servers(fleet, ranks) for fleet in rollout.fleets)


def _servers(servers: Servers, ranks: int) -> EngineWork:
    trainers = {str(gpu) for gpu in range(min(ranks, GPUS_PER_NODE))}
    own_gpus = bool(servers.devices) and not any(trainers & set(group) for group in servers.devices)
    return EngineWork(
        kind="sglang",
        count=len(servers.urls) or servers.count,
        tp=servers.tp,
        running=servers.max_running,
        shares_gpus=not servers.urls and not own_gpus,
        kv_tokens=servers.kv_tokens,
        memory_fraction=servers.memory_fraction,
    )
