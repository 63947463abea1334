"""The same global batch gives the same loss and gradients however it is laid out; training resumes exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megavar.data.training_set import Example, write_training_set


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, torchrun) -> dict:
    root = tmp_path_factory.mktemp("trainer")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.dim() > 1 else 1 + torch.randn_like(p) * 0.1)
    model.save_pretrained(root / "hf")
    rng = np.random.default_rng(0)
    examples = []
    for question in range(5):
        for _ in range(rng.integers(1, 4)):
            length = int(rng.integers(6, 30))
            examples.append(
                Example(
                    question_id=f"q{question}",
                    ids=rng.integers(0, 53, length).astype(np.int32),
                    response_start=int(rng.integers(1, length - 1)),
                    weight=float(rng.random()),
                )
            )
    write_training_set(root / "train.arrow", examples)
    (root / "work").mkdir()
    script = Path(__file__).with_name("trainer_ranks.py")
    return torchrun(script, root / "hf", root / "train.arrow", root / "work", ranks=4)


def test_loss_and_gradients_do_not_depend_on_the_layout(report: dict) -> None:
    """Against transformers in float64, relative; the contract is 1e-5."""
    assert len(report["gradients"]) == 9
    for layout, error in report["gradients"].items():
        assert error < 1e-5, layout


def test_scores_equal_transformers_under_every_layout(report: dict) -> None:
    assert report["scores"] < 1e-4


def test_a_killed_fit_resumes_to_the_same_losses(report: dict) -> None:
    """Killed after step 5 with a checkpoint at step 3: the losses of steps 4 to 8 come out bit for bit."""
    assert len(report["whole"]) == 8
    assert report["resumed"] == report["whole"]


def test_training_agrees_between_tensor_and_pipeline_parallelism(report: dict) -> None:
    assert report["pipeline"] == pytest.approx(report["whole"], rel=1e-5)


def test_bfloat16_trains_close_to_float32(report: dict) -> None:
    assert report["bfloat16"] == pytest.approx(report["whole"], rel=3e-2)
