"""A run of a mixture of experts in front of a real SGLang server: its routes are stored, scored by and learnt with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_recipe import megavar, write_recipe
from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megavar.config.recipe import Arm
from megavar.data.store import PartStore
from megavar.data.traces import TraceStore
from megavar.data.training_set import TrainingSet
from megavar.errors import UserError
from megavar.phases.scoring import POLICY_SCORES
from megavar.rollout.engine_env import engine_python

pytestmark = pytest.mark.engine


@pytest.fixture
def mixture(inputs: Path, tmp_path: Path) -> Path:
    """The inputs with a mixture of experts of the same vocabulary in the model's place."""
    shutil.copytree(inputs, tmp_path / "inputs")
    dense = Qwen3Config.from_pretrained(inputs / "model")
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "head_dim", "max_position_embeddings", "eos_token_id", "pad_token_id")
    config = Qwen3MoeConfig(
        **{name: getattr(dense, name) for name in kept},
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "inputs" / "model")
    return tmp_path / "inputs"


def test_experts_of_the_server_are_scored_and_learnt_with(mixture: Path, tmp_path: Path) -> None:
    try:
        venv = engine_python().parent.parent
    except UserError as error:
        pytest.skip(str(error))
    recipe = write_recipe(tmp_path / "run.toml", mixture, arms=(Arm(name="latro", objective="latro"),))
    words = ["--rollout.engine", "sglang", "--rollout.servers.venv", venv, "--rollout.replay_experts", "true"]
    words += ["--trainer.ep", 2, "--posterior.fit.steps", 2, "--until", "arms/latro/fit"]
    done = megavar("run", recipe, *words)
    assert done.returncode == 0, done.stderr[-4000:]
    (stack,) = [line for line in done.stderr.splitlines() if line.startswith("stack: ")]
    run = recipe.with_suffix("")
    fit = json.loads((run / "arms/latro/fit/manifest.json").read_text())
    assert fit["metrics"]["perf/stack"] == stack.removeprefix("stack: ") and "experts: one" in stack

    scored = json.loads((run / "own/policy_scores/manifest.json").read_text())["metrics"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "arms/latro/fit" and line["step"] > 0]
    shares = [scored["rollout/replayed_share"], *(line["train/replayed_share"] for line in steps)]
    # Tokens up to the thought's end; a reference solution behind it was not sampled.
    assert len(shares) > 1 and all(0.3 < share <= 1 for share in shares), shares

    scores = PartStore(run / "own/policy_scores/scores", POLICY_SCORES).read_keyed(["thought"])
    recorded: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for t in TraceStore(run / "own/traces/traces").iter_traces():
        sampled = len(t.thought_ids) + len(t.answer_ids)
        experts = np.asarray(t.experts)
        assert experts.dtype == np.uint8 and experts.shape == (len(t.prompt_ids) + sampled - 1, 2, 2)
        seen = np.concatenate([t.prompt_ids, t.thought_ids])
        recorded.setdefault(t.question_id, []).append((seen, experts[: len(seen)]))
        if t.closed:
            ours = scores[t.question_id, t.index]["thought"]
            np.testing.assert_allclose(ours, t.thought_logprobs, atol=1e-4)
    assert len(scores) > 10

    learnt = TrainingSet(run / "arms/latro/data/train.arrow")
    assert learnt.num_examples > 10
    for n in range(learnt.num_examples):
        example, experts = learnt[n], np.asarray(learnt[n].experts)
        # The trace it is of, and the experts of its tokens that are computed; what follows the thought has none.
        computed = example.ids[:-1]
        of = [e for ids, e in recorded[example.question_id] if np.array_equal(example.ids[: len(ids)], ids)]
        assert any(np.array_equal(experts, e[: len(computed)]) for e in of)
