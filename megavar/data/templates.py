"""Prompt templates: one registry for training, sampling and evaluation, and the encoder that applies them.

The one rule of tokenisation: a template is a sequence of segments, fixed pieces and inserted texts; every
segment is tokenised by itself and the ids are concatenated. Special tokens are recognised in fixed pieces
alone, so a question that quotes `<|im_end|>` cannot close its turn. Hence a boundary between segments is
always a boundary between tokens, and a thought has the same ids whatever prompt precedes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megavar.data.records import Question
from megavar.data.suggest import did_you_mean
from megavar.data.tokens import TokenCodec
from megavar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megavar.config.recipe import Templates

PLACEHOLDER = re.compile(r"\{(question|solution)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A prompt and the markers that delimit what follows it."""

    name: str
    prompt: str
    """Up to the first thought token. `{question}` and, for a posterior, `{solution}` are replaced
    literally."""
    thought_end: str
    """Ends a thought and is part of it."""
    answer_start: str
    """Between `thought_end` and the answer's text; part of the answer, forced when answers are sampled."""
    answer_end: str
    """Ends an answer and is part of it."""

    @property
    def placeholders(self) -> frozenset[str]:
        return frozenset(PLACEHOLDER.findall(self.prompt))


def chat(system: str, user: str, assistant: str) -> str:
    """ChatML with an open assistant turn."""
    turns = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{turns}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}"


THINK_THEN_SOLVE = (
    "You solve problems by thinking at length before you commit to an answer. Every reply has two parts.\n"
    "Thought: work through the problem as it comes to you, between <|begin_of_thought|> and "
    "<|end_of_thought|>. Restate what is asked, try approaches, compute step by step, check intermediate "
    "results, go back where something does not fit, and stop once you are sure.\n"
    "Solution: then, between <|begin_of_solution|> and <|end_of_solution|>, write the clean result of that "
    "thought: the steps a reader needs and the final answer, without detours."
)
SOLVE_THEN_EXPLAIN = (
    "You give an accurate solution first and the detailed explanation behind it second. Every reply has two "
    "parts.\n"
    "Solution: the correct solution of the problem, between <|begin_of_solution|> and <|end_of_solution|>.\n"
    "Explanation: then, between <|begin_of_explanation|> and <|end_of_explanation|>, a full account of how "
    "one gets there from the problem alone: what is asked, which approaches suggest themselves, every "
    "computation, and the checks that make the result certain."
)
RECONSTRUCT_THOUGHT = (
    "You are shown a problem and its solution, and you reconstruct the reasoning that produced it. Every "
    "reply has two parts.\n"
    "Solution: the solution as given, between <|begin_of_solution|> and <|end_of_solution|>.\n"
    "Thought: then, between <|begin_of_thought|> and <|end_of_thought|>, the inner reasoning "
    "reverse-engineered from it, as it would have run before the solution was known: exploring, computing, "
    "doubting, checking, and arriving. It never refers to the solution as something already at hand."
)
RECONSTRUCT_THINK = (
    "You are given a problem together with a reference solution. Think as someone would who has only the "
    "problem: explore, compute, check and arrive at that solution by reasoning. Never mention that a "
    "solution was given."
)

_GIVEN_SOLUTION = "<|begin_of_solution|>\n\n{solution}<|end_of_solution|>\n\n"

# The thought's end marker is the common prefix of <|end_of_thought|> and <|end_of_explanation|>, and the rest
# of the marker is scored with the answer: a posterior that writes explanations then shares its thoughts' ids
# with the policy.
REGISTRY: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="thought_solution",
            prompt=chat(THINK_THEN_SOLVE, "{question}", "<|begin_of_thought|>\n\n"),
            thought_end="<|end_of",
            answer_start="_thought|>\n\n<|begin_of_solution|>",
            answer_end="<|end_of_solution|>",
        ),
        Template(
            name="posterior_a",
            prompt=chat(SOLVE_THEN_EXPLAIN, "{question}", _GIVEN_SOLUTION + "<|begin_of_explanation|>\n\n"),
            thought_end="<|end_of",
            answer_start="_explanation|>",
            answer_end="<|im_end|>",
        ),
        Template(
            name="posterior_b",
            prompt=chat(RECONSTRUCT_THOUGHT, "{question}", _GIVEN_SOLUTION + "<|begin_of_thought|>\n\n"),
            thought_end="<|end_of",
            answer_start="_thought|>",
            answer_end="<|im_end|>",
        ),
        Template(
            name="qwen3_think",
            prompt=chat("", "{question}", "<think>\n"),
            thought_end="</think>",
            answer_start="\n\n",
            answer_end="<|im_end|>",
        ),
        Template(
            name="qwen3_think_posterior",
            # Each inserted text closes its turn: between two texts of one turn "?\n\n" would be cut in two
            # tokens.
            prompt=chat(RECONSTRUCT_THINK + "\nReference solution:\n{solution}", "{question}", "<think>\n"),
            thought_end="</think>",
            answer_start="\n\n",
            answer_end="<|im_end|>",
        ),
    )
}


def known_templates(templates: Templates) -> dict[str, Template]:
    """Built-in and custom templates by name.

    Raises UserError for a custom one that hides a built-in, has no place for the question, or no end markers.
    """
    known = dict(REGISTRY)
    for name, spec in templates.custom.items():
        own, where = Template(name=name, **spec.model_dump()), f"templates.custom.{name}"
        if name in REGISTRY:
            raise UserError(f"{where}: the name is taken by a built-in template; choose another")
        if "question" not in own.placeholders:
            raise UserError(f"{where}: the prompt has no {{question}}")
        if not own.thought_end or not own.answer_end:
            raise UserError(f"{where}: needs a non-empty thought_end and answer_end")
        known[name] = own
    return known


def resolve_templates(templates: Templates) -> tuple[Template, Template]:
    """The (policy, posterior) templates a recipe names.

    Raises UserError: see `known_templates`; an unknown name, a policy that sees the solution, a posterior that does
    not, thought end markers that differ.
    """
    known = known_templates(templates)
    chosen = {}
    for role, name in (("policy", templates.policy), ("posterior", templates.posterior)):
        if name not in known:
            raise UserError(f"templates.{role}: no template {name!r}; {did_you_mean(name, known)}")
        chosen[role] = known[name]
    policy, posterior = chosen["policy"], chosen["posterior"]
    if "solution" in policy.placeholders:
        raise UserError(
            f"templates.policy: {policy.name!r} shows the {{solution}}; that is a posterior's template"
        )
    if "solution" not in posterior.placeholders:
        raise UserError(f"templates.posterior: the prompt of {posterior.name!r} has no {{solution}}")
    if policy.thought_end != posterior.thought_end:
        raise UserError(
            f"templates: {policy.name!r} ends thoughts with {policy.thought_end!r} and {posterior.name!r} "
            f"with {posterior.thought_end!r}; they must be equal, so that both score the same ids"
        )
    return policy, posterior


@dataclass(frozen=True, slots=True)
class Split:
    """Sampled ids cut at the end of the thought."""

    thought_ids: np.ndarray
    """int32 [Z]; the end marker included when `closed`, all ids otherwise."""
    answer_ids: np.ndarray
    """int32 [A]; what follows the marker."""
    closed: bool
    """The end marker was found and ends at a token's end."""
    clean: bool
    """False where the token that completes the marker carries text beyond it; such a trace is not closed."""


@dataclass(frozen=True, slots=True)
class AnswerText:
    text: str
    """Between `answer_start` and `answer_end`, as written."""
    started: bool
    """The ids began with the text of `answer_start`; where they did not, `text` is counted from the first
    id."""
    ended: bool
    """`answer_end` was found; where it was not, the answer was cut off."""


class Encoder:
    """One template on one tokenizer. Stateless after construction, so threads may share it.

    Raises UserError where the tokenizer cannot represent the template's fixed pieces.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = template
        self.codec = TokenCodec(tokenizer)
        # re.split with one group: fixed pieces at even places, placeholder names at odd ones.
        pieces = PLACEHOLDER.split(template.prompt)
        self._prompt = [
            piece if place % 2 else self._fixed("prompt", piece) for place, piece in enumerate(pieces)
        ]
        self.thought_end_ids = self._fixed("thought_end", template.thought_end)
        self.answer_end_ids = self._fixed("answer_end", template.answer_end)
        self.answer_start_ids = self._fixed("answer_start", template.answer_start)
        """int32; forced before an answer is sampled."""

    def prompt_ids(self, question: Question) -> np.ndarray:
        """int32 [P]: everything before the first thought token. Raises UserError if a needed solution is
        empty."""
        texts = {"question": question.prompt, "solution": question.solution}
        if "solution" in self.template.placeholders and not question.solution.strip():
            raise UserError(
                f"question {question.id!r} has no solution, and template {self.template.name!r} shows it"
            )
        return np.concatenate(
            [
                segment if isinstance(segment, np.ndarray) else self._inserted(texts[segment], question.id)
                for segment in self._prompt
            ]
        )

    def thought_ids(self, text: str) -> np.ndarray:
        """int32 [Z]: a reference thought and its end marker.

        Raises UserError where the text itself contains the marker: the thought would end earlier when read
        back.
        """
        ids = np.concatenate([self._inserted(text, "of a thought"), self.thought_end_ids])
        split = self.split(ids)
        if not split.closed or len(split.answer_ids):
            raise UserError(
                f"a thought must not contain its own end marker {self.template.thought_end!r}: {text[:60]!r}"
            )
        return ids

    def cuts(self, text: str) -> bool:
        """Whether a thought of this text would end before its end marker: it spells the marker itself.

        A marker that is one added token has no spelling in a text.
        """
        marker = self.template.thought_end
        return not self.codec.is_added(self.thought_end_ids) and (text + marker).find(marker) < len(text)

    def answer_ids(self, text: str) -> np.ndarray:
        """int32 [A]: `answer_start`, the text, `answer_end`."""
        return np.concatenate(
            [self.answer_start_ids, self._inserted(text, "of an answer"), self.answer_end_ids]
        )

    def split(self, ids: np.ndarray) -> Split:
        """Cut sampled ids after the first token whose text completes the end marker; O(len(ids))."""
        ids = np.asarray(ids, dtype=np.int32)
        empty = np.empty(0, dtype=np.int32)
        end, clean = self.codec.find(ids, self.thought_end_ids, self.template.thought_end)
        if end is None or not clean:
            return Split(ids, empty, closed=False, clean=clean)
        return Split(ids[:end], ids[end:], closed=True, clean=True)

    def answer_text(self, answer_ids: np.ndarray) -> AnswerText:
        """The text of an answer for people and verifiers; malformed UTF-8 becomes U+FFFD."""
        ids = np.asarray(answer_ids, dtype=np.int32)
        text = self.codec.to_bytes(ids)
        start = self.template.answer_start.encode()
        started = text.startswith(start)
        begin = len(start) if started else 0
        end = self.codec.find_byte(ids, self.answer_end_ids, self.template.answer_end, begin)
        return AnswerText(text[begin:end].decode("utf-8", errors="replace"), started, ended=end is not None)

    def _fixed(self, part: str, text: str) -> np.ndarray:
        ids = self.codec.encode_fixed(text)
        if self.codec.to_bytes(ids) != text.encode():
            raise UserError(
                f"template {self.template.name!r}: the tokenizer turns {part} {text[:60]!r} into "
                f"{self.codec.to_bytes(ids)[:60].decode('utf-8', errors='replace')!r}; use another"
            )
        return ids

    def _inserted(self, text: str, whose: str) -> np.ndarray:
        return self.codec.encode_text(text, whose)


def check_thoughts(encoder: Encoder, questions: Iterable[Question]) -> None:
    """Raise one UserError if any question's own trace holds the end marker of thoughts."""
    cut = [question.id for question in questions if encoder.cuts(question.trace or "")]
    if cut:
        first = ", ".join(cut[:5]) + (", ..." if len(cut) > 5 else "")
        raise UserError(
            f"{len(cut)} traces contain {encoder.template.thought_end!r}, with which template "
            f"{encoder.template.name!r} ends a thought (ids {first}); take it out of them"
        )


def check_lengths(encoder: Encoder, questions: Iterable[Question], context_length: int) -> list[int]:
    """Tokens of each prompt. Raises one UserError if any leaves no room for a token in `context_length` tokens."""
    lengths, too_long = [], []
    for question in questions:
        lengths.append(len(encoder.prompt_ids(question)))
        if lengths[-1] >= context_length:
            too_long.append(f"{question.id} ({lengths[-1]} tokens)")
    if too_long:
        first = ", ".join(too_long[:5]) + (", ..." if len(too_long) > 5 else "")
        raise UserError(
            f"{len(too_long)} of {len(lengths)} questions do not fit a context of {context_length} tokens under "
            f"template {encoder.template.name!r}: {first}; remove them or raise the context length"
        )
    return lengths
