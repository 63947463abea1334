"""A fit goes on from its checkpoint under any layout, as if it had never been elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megavar.data.training_set import Example, write_training_set

COMMON = dict(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def write_model(path: Path, config: Qwen3Config | Qwen3MoeConfig) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.dim() > 1 else 1 + torch.randn_like(p) * 0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, torchrun) -> dict:
    root = tmp_path_factory.mktemp("resume")
    dense = write_model(root / "dense", Qwen3Config(**COMMON, tie_word_embeddings=True))
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    mixture = write_model(root / "mixture", Qwen3MoeConfig(**COMMON, **experts, tie_word_embeddings=False))
    rng = np.random.default_rng(0)
    examples = [
        Example(
            question_id=f"q{question}",
            ids=rng.integers(0, 53, int(n)).astype(np.int32),
            response_start=int(n) // 3,
            weight=float(rng.random()),
        )
        for question in range(5)
        for n in rng.integers(6, 30, 3)
    ]
    write_training_set(root / "train.arrow", examples)
    (root / "work").mkdir()
    script = Path(__file__).with_name("resume_ranks.py")
    return torchrun(script, dense, mixture, root / "train.arrow", root / "work", ranks=4, timeout=1500)


@pytest.mark.parametrize("kind", ["dense", "mixture", "bfloat16"])
def test_unchanged_layouts_go_on_bitwise(report: dict, kind: str) -> None:
    same = {move: e for move, e in report[kind].items() if len(set(move.split(" -> "))) == 1}
    assert same and all(errors["bitwise"] for errors in same.values())


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_other_layouts_go_on_to_the_losses_and_weights_of_their_own(report: dict, kind: str) -> None:
    """Optimizer state included: Adam's moments weigh more in these few steps than anywhere later.

    Layouts with "te" are of the layers that Megatron's transformer-engine spec puts together, of stubs.
    """
    assert len(report[kind]) >= 4 and sum(" te" in move for move in report[kind]) == 2
    for move, errors in report[kind].items():
        assert errors["loss"] < 1e-5 and errors["weights"] < 1e-4, (move, errors)


def test_bfloat16_keeps_its_float32_copies(report: dict) -> None:
    for move, errors in report["bfloat16"].items():
        assert errors["loss"] < 2e-2, (move, errors)


def test_the_pointer_follows_what_is_complete_and_old_ones_go(report: dict) -> None:
    """A checkpoint after every step: at the end of step n the one of step n is being written at most."""
    files = report["files"]
    for step, (latest, kept) in enumerate(zip(files["latest"], files["kept"], strict=True), start=1):
        assert latest in (step - 1, step - 2) or (step == 1 and latest == 0)
        # While the pointer moves there may be one more.
        assert latest in [0, *kept] and len(kept) <= 3
    assert files["kept"][-1][-1] >= 4


def test_a_checkpoint_of_another_fit_is_refused_by_what_differs(report: dict) -> None:
    refused = report["files"]["other fit"]
    assert "a checkpoint of another fit" in refused and "fit.lr: 0.003 -> 0.001" in refused
    assert "checkpoint_keep" not in refused and "weight_decay" not in refused
    assert "training_set: d -> e" in report["files"]["other data"]


def test_a_torn_checkpoint_is_refused_and_the_one_before_it_serves(report: dict) -> None:
    files = report["files"]
    assert "step-000005: the checkpoint is damaged" in files["torn"] and "has 100 bytes" in files["torn"]
    assert files["from the one before"] == 2 and files["same weights"]


def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_one_before(report: dict) -> None:
    assert report["killed while writing"] == {"latest": 2, "losses": True, "weights": True}


def test_a_fit_in_stretches_keeps_its_optimizer_state(report: dict) -> None:
    assert report["stretches"]
