"""A round small enough to be run many times, and the command that runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megavar.config.recipe import Arm

REPOSITORY = Path(__file__).resolve().parents[2]

RECIPE = """
name = "small"
out = "{out}"
warm_start = "initial"
[model]
path = "{inputs}/model"
dtype = "float32"
[data.train]
kind = "jsonl"
path = "{inputs}/train.jsonl"
[data.eval]
kind = "reasoning_gym"
name = "chain_sum"
size = 16
seed = 1_000_000
options = {{ min_terms = 4, max_terms = 4, min_digits = 1, max_digits = 1 }}
[templates]
policy = "qwen3_think"
posterior = "with_answer"
[templates.custom.with_answer]
prompt = "<|im_start|>user\\n{{question}}\\nThe answer is {{solution}}.<|im_end|>\\n<|im_start|>assistant\\n<think>\\n"
thought_end = "</think>"
answer_start = "\\n\\n"
answer_end = "<|im_end|>"
[trainer]
ranks = 2
[initial]
questions_per_step = 24
steps = {steps}
lr = 5e-3
checkpoint_every = {checkpoint_every}
[posterior]
objective = "{objective}"
traces = 4
[posterior.fit]
questions_per_step = 24
steps = {steps}
lr = 5e-3
checkpoint_every = {checkpoint_every}
[rollout]
traces = 3
answers = 2
max_thought_tokens = 3
max_answer_tokens = 6
questions_per_part = 16
[final]
questions_per_step = 24
steps = 4
lr = 3e-3
checkpoint_every = 2
[evaluate]
max_tokens = 24
"""


def write_recipe(
    path: Path,
    inputs: Path,
    *,
    arms: tuple[Arm, ...],
    steps: int = 12,
    checkpoint_every: int = 4,
    objective: str = "sft",
) -> Path:
    """`path` becomes a recipe that runs into `<path without suffix>`."""
    text = RECIPE.format(
        out=path.with_suffix(""),
        inputs=inputs,
        steps=steps,
        checkpoint_every=checkpoint_every,
        objective=objective,
    )
    for arm in arms:
        values = arm.model_dump(exclude_defaults=True)
        text += "[[arms]]\n" + "".join(
            f"{k} = {str(v).lower() if v is True else repr(v)}\n" for k, v in values.items()
        )
    path.write_text(text)
    return path


def make_inputs(out: Path) -> Path:
    """48 questions with traces, and the quickstart's tiny model."""
    prepare = REPOSITORY / "examples" / "quickstart" / "prepare.py"
    subprocess.run(
        [sys.executable, str(prepare), str(out), "--questions", "48"], check=True, capture_output=True
    )
    return out


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "megavar.cli", *map(str, words)]


def megavar(*words: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    env = {**os.environ, "COLUMNS": "150"}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout, env=env)


def results(run: Path) -> dict[str, bytes]:
    """Path -> content of each file that a run must reproduce: stores, training sets, weights, the table."""
    names = ("part-*.parquet", "train.arrow", "train.json", "*.safetensors", "table.json")
    found = {p for name in names for p in run.rglob(name) if ".stale-" not in str(p)}
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(found)}


def visible_files(run: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> (time of change, content) of every file that is not hidden."""
    found = ((p.relative_to(run), p) for p in sorted(run.rglob("*")) if p.is_file())
    shown = ((name, p) for name, p in found if not any(part.startswith(".") for part in name.parts))
    return {name.as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for name, p in shown}
