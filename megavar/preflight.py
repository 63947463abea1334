"""What can be known of a recipe before long work starts: every check here takes seconds and allocates nothing."""

from __future__ import annotations

from transformers import AutoTokenizer

from megavar.config.recipe import Recipe
from megavar.data.questions import load_questions, require_solutions, require_traces
from megavar.data.templates import Encoder, check_lengths, resolve_templates
from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.models.hf_files import check_hf_directory


def check(recipe: Recipe) -> None:
    """Raises UserError naming the first thing that cannot work: model files, layout, questions, prompts, lengths."""
    architecture = read_architecture(recipe.model.path)
    architecture.check_layout(tp=recipe.trainer.tp, pp=recipe.trainer.pp)
    check_hf_directory(recipe.model.path, architecture)
    policy, posterior = resolve_templates(recipe.templates)
    train, held_out = load_questions(recipe.data.train), load_questions(recipe.data.eval)
    require_solutions(train)
    require_traces(train)
    overlap = {q.id for q in train} & {q.id for q in held_out}
    if overlap:
        raise UserError(f"data.eval: {len(overlap)} questions are in data.train too, first {min(overlap)!r}")
    context = min(architecture.max_positions, recipe.rollout.context_length or architecture.max_positions)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, local_files_only=True)
    for template, questions in ((policy, train), (posterior, train), (policy, held_out)):
        check_lengths(Encoder(template, tokenizer), questions, context)
