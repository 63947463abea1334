"""The recipe: every choice a run is made of, typed. Torch-free, so that help and validation are instant.

Each field's docstring is its help text. Defaults are the paper's (arXiv 2509.22637, section 5 and Appendix C)
where the paper gives one. Architecture is never asked for: it is read from the model's `config.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megavar.config.arm import Arm
from megavar.config.rollout import Rollout
from megavar.config.section import Section
from megavar.config.switches import (
    POSTERIOR_SWITCHES,
    PROPOSED,
    check_online,
    check_switches,
    check_traces,
)
from megavar.errors import UserError
from megavar.models.parallel_layout import ParallelLayout

TRAINING_TOKENS, SCORING_TOKENS = 16384, 65536
"""Token budgets of micro-batches where nobody asks for others."""


class Model(Section):
    path: Path
    """Hugging Face directory of the base model: config.json, safetensors, tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter and activation type of the trainer; optimizer state and reductions are float32."""


class QuestionSource(Section):
    kind: Literal["jsonl", "parquet", "hf_dataset", "reasoning_gym"]
    """Where questions come from. `hf_dataset` is a directory written by `datasets.save_to_disk`."""
    path: Path | None = None
    """File or directory; a glob is allowed for jsonl and parquet. Not used by reasoning_gym."""
    split: str = "train"
    """Split of an hf_dataset that holds several."""
    name: str = ""
    """reasoning_gym dataset name, for example "chain_sum"."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Passed to `reasoning_gym.create_dataset`."""
    size: int | None = Field(default=None, ge=1)
    """Take this many questions; None takes all (reasoning_gym needs a number)."""
    seed: int = 0
    """Seed of a reasoning_gym dataset."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Question field -> column name where they differ, for example {prompt = "question_content"}."""
    verifier: str = ""
    """Verifier for rows that name none; empty means "exact", or reasoning_gym's own scorer."""

    @model_validator(mode="after")
    def _complete(self) -> QuestionSource:
        if self.kind == "reasoning_gym":
            if not self.name or self.size is None:
                raise ValueError("a reasoning_gym source needs `name` and `size`")
        elif self.path is None:
            raise ValueError(f"a {self.kind} source needs `path`")
        return self


class Data(Section):
    train: QuestionSource
    """Questions with reference answers and solutions, and with traces where phases 1 and 2 fit them."""
    eval: QuestionSource
    """Held-out questions."""


class TemplateSpec(Section):
    """A user-defined prompt template; see `megavar.data.templates` for the meaning of each part."""

    prompt: str
    """Text up to the first thought token; `{question}` and, for a posterior, `{solution}` are replaced."""
    thought_end: str
    """Marker that ends a thought; part of the thought."""
    answer_start: str = ""
    """Text between the marker and the answer; scored with the answer, forced when answers are sampled."""
    answer_end: str
    """Marker that ends an answer; part of the answer."""


class Templates(Section):
    policy: str = "thought_solution"
    """Name of the policy's template in the registry or under `custom`."""
    posterior: str = "posterior_b"
    """Name of the posterior's template; its thought end marker must be the policy's."""
    custom: dict[str, TemplateSpec] = Field(default_factory=dict)
    """User-defined templates by name."""


class Trainer(Section):
    ranks: int = Field(default=1, ge=1)
    """Processes in all; data parallelism is ranks / (tp * pp * cp)."""
    tp: int = Field(default=1, ge=1)
    """Tensor parallelism."""
    pp: int = Field(default=1, ge=1)
    """Pipeline parallelism (1F1B)."""
    vpp: int = Field(default=1, ge=1)
    """Model chunks per pipeline stage; more than one interleaves the schedule and shortens its idle ends."""
    cp: int = Field(default=1, ge=1)
    """Context parallelism: every trace is split over this many ranks."""
    ep: int = Field(default=1, ge=1)
    """Expert parallelism, within what is data and context parallel for the rest of the model."""
    etp: int = Field(default=1, ge=1)
    """Tensor parallelism inside an expert."""
    sequence_parallel: bool = False
    """Shard activations between the tensor-parallel regions along the sequence."""
    packing: bool = True
    """Several traces per micro-batch with block-diagonal attention; false puts one trace in each."""
    tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Token budget of a training micro-batch, at least the longest trace; none: 16384, and to a longer trace its own
    micro-batch."""
    scoring_tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Token budget of a scoring micro-batch (forward only), likewise; none: 65536."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation, as in Megatron-Core."""
    expert_balance: float = Field(default=0.0, ge=0)
    """Coefficient of the auxiliary loss that spreads tokens evenly over the experts of a mixture."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Megatron-Core's own switches, fields of its TransformerConfig, for example FP8: {fp8 = "hybrid", fp8_recipe =
    "tensorwise", first_last_layers_bf16 = true}. See docs/plan.md."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each rank."""
    seed: int = Field(default=1234, ge=0)
    """Of the order of questions within each epoch and of every random choice of the trainer."""

    @model_validator(mode="after")
    def _divides(self) -> Trainer:
        try:
            _ = self.layout
        except UserError as error:
            raise ValueError(str(error)) from None
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel needs tp > 1")
        return self

    @property
    def training_budget(self) -> int:
        """Tokens of a training micro-batch that no single trace exceeds."""
        return self.tokens_per_micro_batch or TRAINING_TOKENS

    @property
    def scoring_budget(self) -> int:
        """Tokens of a scoring micro-batch that no single trace exceeds."""
        return self.scoring_tokens_per_micro_batch or SCORING_TOKENS

    @property
    def layout(self) -> ParallelLayout:
        """How the ranks split the model."""
        return ParallelLayout(
            ranks=self.ranks, tp=self.tp, pp=self.pp, vpp=self.vpp, cp=self.cp, ep=self.ep, etp=self.etp
        )


class Fit(Section):
    """One training phase: what the optimizer does."""

    questions_per_step: int = Field(default=96, ge=1)
    """Global batch, in questions; all traces of a question are in the same step."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the questions; ignored when `steps` is given."""
    steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps."""
    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Fraction of the steps with linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    clip: float = Field(default=1.0, ge=0)
    """Clip of the global gradient norm; 0 turns it off."""
    checkpoint_every: int = Field(default=100, ge=0)
    """Steps between resumable checkpoints, written while training goes on; 0 writes none but on pre-emption."""
    checkpoint_keep: int = Field(default=2, ge=1)
    """Checkpoints that stay; older ones are removed once a newer one is complete."""

    @model_validator(mode="after")
    def _optimizer(self) -> Fit:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr:g} is above the peak, lr = {self.lr:g}")
        return self


class Posterior(Section):
    objective: Literal["sft", "forward_kl", "reverse_kl", "iwae", "trajectory_balance", "rlt"] = "sft"
    """Fit q on the data set's traces (`sft`, what the authors ran) or on weighted policy traces (Eq. 9); the others
    go on from `sft` with q's own traces. See docs/objectives.md."""
    traces: int = Field(default=8, ge=1, le=256)
    """M: traces per question, of the policy for `forward_kl`, of q itself after that."""
    estimator: Literal["accuracy", "gml", "likelihood", "mean_probability", "hybrid"] = "hybrid"
    """Estimator of c(z) in the reward of `reverse_kl`, `iwae` and `trajectory_balance`."""
    kl: float | None = Field(default=None, ge=0)
    """Weight of log q/pi in the reward; none: 1 for `reverse_kl`, 3 for `rlt`."""
    fit: Fit = Fit(questions_per_step=16, epochs=10, warmup=0.05, betas=(0.9, 0.95), weight_decay=1e-4)
    tune: Fit = Fit(questions_per_step=16, epochs=1, lr=1e-6, betas=(0.9, 0.95))
    """The fit on q's own traces, which follows `fit`."""

    @model_validator(mode="after")
    def _consistent(self) -> Posterior:
        check_switches(self, self.objective, POSTERIOR_SWITCHES, frozenset({"objective", "traces", "fit"}))
        if self.objective in ("reverse_kl", "trajectory_balance") and self.estimator == "accuracy":
            raise ValueError(
                f'objective = "{self.objective}" takes the logarithm of c, which is -inf for accuracy 0; '
                'use estimator = "hybrid"'
            )
        return self


class Diagnostics(Section):
    """What is watched about the traces; see docs/objectives.md."""

    leak_phrases: tuple[str, ...] = ()
    """Further phrases, beside the built-in ones, by which a posterior's trace betrays that it saw the solution."""
    leak_ngram: int = Field(default=8, ge=2)
    """Words in a row that make a quotation of the solution."""
    leak_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the solution that a trace may not quote."""
    leak_alarm: float = Field(default=0.1, ge=0, le=1)
    """Share of leaking traces above which a phase warns."""


class Evaluate(Section):
    samples: int = Field(default=1, ge=1)
    """Completions per held-out question."""
    temperature: float = Field(default=0.7, ge=0)
    """Of the completions; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling."""
    max_tokens: int = Field(default=38912, ge=1)
    """Thought and answer together."""
    seed: int = 0
    """Every completion's own seed is derived from this."""


class Wandb(Section):
    project: str = ""
    """Project that the run is shown in; empty: not at all."""
    entity: str = ""
    """User or team; empty: the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` keeps everything in the run directory, for `wandb sync`."""


class Tracking(Section):
    """Other places for the metrics; `metrics.jsonl` in the run directory is always written. See docs/metrics.md."""

    wandb: Wandb = Wandb()
    """Weights & Biases; a run directory is one run there, however often it is resumed."""
    tensorboard: bool = False
    """Event files under `tensorboard/` in the run directory."""


class Recipe(Section):
    name: str = "run"
    """Used in tables and logs."""
    rounds: int = Field(default=1, ge=1)
    """T: 1 is the paper's offline round over all arms; more go on with one arm, `final` and `posterior.fit` a round.
    An arm whose traces are the policy's own has no posterior then."""
    out: Path = Path("runs/run")
    """Run directory; running again in it resumes."""
    model: Model
    """The base model."""
    data: Data
    """Training and held-out questions."""
    templates: Templates = Templates()
    """Prompt templates, shared by training, sampling and evaluation."""
    trainer: Trainer = Trainer()
    """Processes, parallel layout and micro-batches."""
    rollout: Rollout = Rollout()
    """Sampling of traces and answers."""
    initial: Fit = Fit()
    """Phase 1: the initial policy, fitted on the data set's traces."""
    posterior: Posterior = Posterior()
    """Phase 2: the posterior q(z|x,y')."""
    final: Fit = Fit(questions_per_step=192)
    """Phase 9: every arm's fit."""
    warm_start: Literal["base", "initial"] = "base"
    """Where the final fits start: the base model (as the authors did) or the initial policy (Algorithm 1)."""
    arms: tuple[Arm, ...] = (Arm(name="variational", selection="argmax", mix=True, all_zero="original"),)
    """Ways to train the final policy, compared in one table."""
    diagnostics: Diagnostics = Diagnostics()
    """Leak detector of the posterior's traces."""
    evaluate: Evaluate = Evaluate()
    """Sampling on the held-out questions."""
    tracking: Tracking = Tracking()
    """Other places for the metrics."""

    @model_validator(mode="after")
    def _comparable(self) -> Recipe:
        if not self.arms:
            raise ValueError("arms: there must be at least one")
        names = [arm.name for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arm names must be distinct, got {names}")
        check_traces(self.arms, self.rollout.traces, self.posterior)
        return self

    @model_validator(mode="after")
    def _online(self) -> Recipe:
        if self.rounds == 1 and self.rollout.staleness:
            raise ValueError("rollout.staleness counts rounds: it needs rounds > 1")
        if self.rounds == 1:
            return self
        if len(self.arms) != 1:
            raise ValueError(f"rounds={self.rounds} needs exactly one arm, not {len(self.arms)}")
        check_online(self.arms[0], staleness=self.rollout.staleness)
        if self.arms[0].objective in PROPOSED and self.posterior.objective not in ("sft", "forward_kl"):
            raise ValueError(
                f'rounds={self.rounds} fits the posterior by "forward_kl", at first by "sft" if you like'
            )
        if self.warm_start != "initial":
            raise ValueError(
                f'rounds={self.rounds} goes on from the initial policy: set warm_start = "initial"'
            )
        return self
