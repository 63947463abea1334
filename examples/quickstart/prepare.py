"""Makes what the quickstart trains: a tiny Qwen3 with its own tokenizer, and sums with worked traces of mixed quality.

Of every 100 traces, 60 give the running totals, 25 slip once on the way and carry the error on, 15 skip the work and
guess. The reference answer is right in all of them, so that a trace can only be judged by what follows from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megavar.config.recipe import QuestionSource
from megavar.data.questions import load_questions
from megavar.data.records import Question

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory for model/ and train.jsonl")
    parser.add_argument("--questions", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "train.jsonl").exists() and (args.out / "model" / "model.safetensors").exists():
        return
    args.out.mkdir(parents=True, exist_ok=True)
    sums = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    source = QuestionSource(
        kind="reasoning_gym", name="chain_sum", options=sums, size=args.questions, seed=args.seed
    )
    draw = random.Random(args.seed)
    questions = [dataclasses.replace(q, trace=worked_trace(q, draw)) for q in load_questions(source)]
    make_model(args.out / "model", questions, args.seed)
    with open(args.out / "train.jsonl", "w") as file:
        file.writelines(json.dumps(dataclasses.asdict(q)) + "\n" for q in questions)


def worked_trace(question: Question, draw: random.Random) -> str:
    """Running totals of the sum, right, wrong from some step on, or not at all."""
    terms = question.prompt.partition(":")[2].replace("=", "").split()
    signed = [int(terms[0])] + [int(s + n) for s, n in zip(terms[1::2], terms[2::2], strict=True)]
    kind = draw.random()
    if kind >= 0.85:
        return f" {sum(signed) + draw.randint(-6, 6)}"
    slip = draw.randrange(1, len(signed)) if kind >= 0.6 else None
    totals, total = [], signed[0]
    for step, term in enumerate(signed[1:], start=1):
        total += term + (draw.choice([-3, -2, -1, 1, 2, 3]) if step == slip else 0)
        totals.append(total)
    return "".join(f" {t}" for t in totals)


def make_model(out: Path, questions: list[Question], seed: int) -> None:
    """A random Qwen3 of 0.2M parameters, and a byte-level tokenizer with one token per number and operator."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?-?[0-9]+| ?[-+=]"), "isolated"),
            # No split at spaces: the sentence around the sum becomes one token.
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        text for q in questions for text in (q.prompt, q.trace, "user\n", "assistant\n", "\nThe answer is ")
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(fast),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.05,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
        )
    )
    model.generation_config.update(eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id)
    model.save_pretrained(out)
    fast.save_pretrained(out)


if __name__ == "__main__":
    main()
