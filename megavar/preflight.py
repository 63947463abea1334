"""What can be known of a recipe before long work starts: every check here takes seconds and allocates nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megavar.config.recipe import Recipe
from megavar.data.packing import padded_tokens
from megavar.data.questions import load_questions, require_solutions, require_traces
from megavar.data.records import Question
from megavar.data.suggest import did_you_mean
from megavar.data.templates import Encoder, check_lengths, check_thoughts, resolve_templates
from megavar.doctor.gpus import list_gpus
from megavar.errors import UserError
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.hf_files import check_hf_directory
from megavar.objectives.registry import needs_of, posterior_counts_answers
from megavar.rollout.control import HELD_BACK, NO_EXPERTS, EngineError, ServerControl
from megavar.rollout.engine_env import engine_python
from megavar.tracking.chosen import check_trackers
from megavar.verifiers.sandbox import say_isolation

_FIRST = 64
"""Traces that are counted at least; of these the longest is named."""
_DENSER = 1.5
"""How many more tokens per byte a shorter text may have than any seen so far."""


class _Asked(NamedTuple):
    """A training question, and how many tokens it takes to ask policy and posterior."""

    question: Question
    prompt: int
    hinted: int


def check(recipe: Recipe, *, until: str | None = None, here: bool = True) -> None:
    """Raises UserError naming the first thing that cannot work: model files, layout, questions, prompts, lengths.

    until: the phase to stop after. here: False where other machines run it, whose GPUs and packages nobody knows.
    """
    check_trackers(recipe)
    architecture = read_architecture(recipe.model.path)
    architecture.check_layout(recipe.trainer.layout)
    architecture.check_training(recipe.trainer.layout, sequence_parallel=recipe.trainer.sequence_parallel)
    _check_switches(recipe, architecture, here=here)
    if recipe.rollout.replay_experts and not architecture.is_moe:
        raise UserError(
            f"rollout.replay_experts: a {architecture.family} model has no experts; set it to false"
        )
    _check_servers(recipe)
    check_hf_directory(recipe.model.path, architecture)
    policy, posterior = resolve_templates(recipe.templates)
    if any(arm.name == "initial" for arm in recipe.arms):
        raise UserError('arms: the name "initial" is the initial policy\'s own; choose another')
    if until is not None:
        _check_phase(recipe, until)
    with _about("data.train"):
        train = load_questions(recipe.data.train)
        require_solutions(train)
        require_traces(train)
    with _about("data.eval"):
        held_out = load_questions(recipe.data.eval)
    if any(question.verifier == "code" for question in (*train, *held_out)):
        say_isolation()
    overlap = {q.id for q in train} & {q.id for q in held_out}
    if overlap:
        raise UserError(f"data.eval: {len(overlap)} questions are in data.train too, first {min(overlap)!r}")
    tokenizer = _tokenizer(recipe, architecture)
    encoders = Encoder(policy, tokenizer), Encoder(posterior, tokenizer)
    context = recipe.rollout.context_length or architecture.max_positions
    if context > architecture.max_positions:
        raise UserError(
            f"rollout.context_length is {context}: the model's context is {architecture.max_positions}; leave it out"
        )
    lengths = [check_lengths(encoder, train, context) for encoder in encoders]
    check_lengths(encoders[0], held_out, context)
    asked = [_Asked(*each) for each in zip(train, *lengths, strict=True)]
    with _about("data.train"):
        check_thoughts(encoders[0], train)
    _check_responses(recipe, asked, encoders[0], architecture.max_positions)
    _check_room(recipe, asked, encoders[0], context)
    _check_budgets(recipe, asked, encoders[0], architecture.max_positions)
    _check_traces(recipe, train, *encoders)


def _check_switches(recipe: Recipe, architecture: Architecture, *, here: bool) -> None:
    """Of `trainer.megatron`: Megatron-Core takes them, and FP8 can run on this machine."""
    trainer = recipe.trainer
    if not trainer.megatron:
        return
    import torch  # seconds of imports, which only these switches need

    from megavar.models.build import Site, transformer_config
    from megavar.models.stack import transformer_engine_version
    from megavar.models.switches import check_fp8, check_machine, check_switches

    check_switches(trainer.megatron)
    check_fp8(trainer.megatron, architecture, trainer.layout, dtype=recipe.model.dtype)
    if not here:
        return
    check_machine(
        trainer.megatron,
        transformer_engine=transformer_engine_version(),
        capabilities=lambda: [gpu.compute_capability for gpu in list_gpus()],
    )
    device = torch.device("cuda" if torch.cuda.device_count() else "cpu")
    transformer_config(
        architecture,
        Site(trainer.layout, device),
        dtype=getattr(torch, recipe.model.dtype),
        sequence_parallel=trainer.sequence_parallel,
        recompute=trainer.recompute,
        switches=trainer.megatron,
    )


def _check_servers(recipe: Recipe) -> None:
    """Servers that run already return experts where they are asked for; others may be started until they sample."""
    if not recipe.rollout.replay_experts:
        return
    for url in (url for fleet in recipe.rollout.fleets for url in fleet.urls):
        control = ServerControl(url)
        try:
            if control.answers() and not control.returns_experts():
                raise UserError(f"rollout.replay_experts: {url} returns no experts: {NO_EXPERTS}")
        except EngineError as error:
            raise UserError(f"rollout.replay_experts: {error}") from None
        finally:
            control.close()


def check_engines(recipe: Recipe) -> None:
    """Of the machine that starts servers, which `check` need not run on: raises UserError without their environment."""
    if recipe.rollout.engine == "sglang":
        for fleet in recipe.rollout.fleets:
            if not fleet.urls:
                engine_python(fleet.venv)


@contextmanager
def _about(section: str) -> Iterator[None]:
    """Name the recipe's section in what is said of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{section}: {error}") from None


def _check_phase(recipe: Recipe, until: str) -> None:
    from megavar.rounds import phase_names  # seconds of imports, which only --until needs

    names = phase_names(recipe)
    if until not in names:
        raise UserError(f"--until {until}: no such phase; {did_you_mean(until, names)}")


def _tokenizer(recipe: Recipe, architecture: Architecture) -> PreTrainedTokenizerBase:
    path = recipe.model.path
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(
            f"{path}: no tokenizer (tokenizer.json); copy the tokenizer files of the base model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its tokenizer cannot be loaded ({error}); copy its files again") from None
    if len(tokenizer) > architecture.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {architecture.vocab_size}; "
            "use the tokenizer that belongs to the weights"
        )
    return tokenizer


def _check_responses(recipe: Recipe, asked: Sequence[_Asked], policy: Encoder, context: int) -> None:
    """Every training sequence fits the model: the data set's own traces, and the longest thought to be sampled."""
    longest = recipe.rollout.max_thought_tokens
    markers = sum(map(len, (policy.thought_end_ids, policy.answer_start_ids, policy.answer_end_ids)))
    for q, prompt, hinted in asked:
        # A token is at least a byte: tokens are counted only where bytes might not fit.
        trace_bytes, answer_bytes = len((q.trace or "").encode()), len(q.solution.encode())
        if max(prompt, hinted) + max(longest, trace_bytes) + answer_bytes + markers <= context:
            continue
        answer, thought = len(policy.answer_ids(q.solution)), len(policy.thought_ids(q.trace or ""))
        if max(prompt + thought + answer, hinted + thought) > context:
            raise UserError(
                f"question {q.id!r}: its prompt, trace and solution take "
                f"{max(prompt + thought + answer, hinted + thought)} tokens, the model's context is {context}; "
                "leave the question out or shorten its trace"
            )
        if prompt + longest + answer > context:
            raise UserError(
                f"question {q.id!r}: prompt ({prompt} tokens), a thought of rollout.max_thought_tokens ({longest}) "
                f"and solution ({answer}) exceed the model's context of {context}; set rollout.max_thought_tokens "
                f"to at most {context - prompt - answer}, or leave the question out"
            )


def _check_room(recipe: Recipe, asked: Sequence[_Asked], policy: Encoder, context: int) -> None:
    """Behind the longest thought there is room for an answer, where answers are sampled."""
    longest = recipe.rollout.max_thought_tokens
    if "answers" not in needs_of(recipe.arms) and not posterior_counts_answers(recipe.posterior):
        return
    if recipe.rollout.engine == "sglang":
        context -= HELD_BACK
    prompt, question = max((each.prompt, each.question.id) for each in asked)
    before = prompt + len(policy.answer_start_ids)
    if before + longest >= context:
        raise UserError(
            f"question {question!r}: prompt and a thought of rollout.max_thought_tokens ({longest}) leave no room for "
            f"an answer in {context} tokens; set rollout.max_thought_tokens to at most {context - before - 1}, or "
            "raise rollout.context_length"
        )


def _check_budgets(recipe: Recipe, asked: Sequence[_Asked], policy: Encoder, context: int) -> None:
    """A budget that the recipe names holds the longest trace that may be sampled; others choose themselves."""
    trainer, rollout = recipe.trainer, recipe.rollout
    names = ("tokens_per_micro_batch", "scoring_tokens_per_micro_batch")
    budgets = {name: value for name in names if (value := getattr(trainer, name)) is not None}
    if not budgets or not trainer.packing:
        return
    # Sampled answers are scored and learnt where an arm is made of the policy's own samples, or learns its answers.
    sampled = "own" in needs_of(recipe.arms) or any(arm.answer == "sampled" for arm in recipe.arms)
    answer_tokens = len(policy.answer_start_ids) + rollout.max_answer_tokens if sampled else 0

    def tokens(each: _Asked) -> int:
        answer = max(len(policy.answer_ids(each.question.solution)), answer_tokens)
        return max(each.prompt + answer, each.hinted) + rollout.max_thought_tokens

    longest, question = max((min(tokens(each), context), each.question.id) for each in asked)
    least = padded_tokens(longest, trainer.cp)
    for name, budget in budgets.items():
        if budget < least:
            raise UserError(
                f"trainer.{name} is {budget}: a trace of question {question!r} may have {longest} tokens; set it to at "
                f"least {least}, leave it out, or lower rollout.max_thought_tokens"
            )


def _check_traces(recipe: Recipe, questions: Sequence[Question], policy: Encoder, posterior: Encoder) -> None:
    """Likewise the data set's own traces, which fits learn: longest text first, until what is left is short enough.

    Short enough is what fits at `_DENSER` times the tokens per byte of any text before it; a stranger one is found when
    a fit packs it.
    """
    trainer = recipe.trainer
    budget = trainer.tokens_per_micro_batch
    if budget is None or not trainer.packing:
        return
    with_posterior = recipe.posterior.objective != "forward_kl"

    def size(q: Question) -> int:
        return len(f"{q.prompt}{q.trace}{q.solution}".encode())

    def tokens(q: Question) -> int:
        thought = len(policy.thought_ids(q.trace or ""))
        example = len(policy.prompt_ids(q)) + thought + len(policy.answer_ids(q.solution))
        return max(example, len(posterior.prompt_ids(q)) + thought if with_posterior else 0)

    longest, whose, densest = 0, "", 0.0
    for seen, q in enumerate(sorted(questions, key=size, reverse=True)):
        if seen >= _FIRST and (longest > budget or _DENSER * densest * size(q) <= budget):
            break
        found = tokens(q)
        densest = max(densest, found / max(size(q), 1))
        longest, whose = max((longest, whose), (found, q.id))
    least = padded_tokens(longest, trainer.cp)
    if budget < least:
        raise UserError(
            f"trainer.tokens_per_micro_batch is {budget}: the data set's trace of question {whose!r} has {longest} "
            f"tokens with its prompt and solution; set it to at least {least}, or leave it out"
        )
