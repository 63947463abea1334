"""Megatron-Core's own switches in a recipe, FP8 among them, and what the log says of the machine's stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from megavar.errors import UserError
from megavar.models.architecture import Architecture, read_architecture
from megavar.models.build import Site, transformer_config
from megavar.models.parallel_layout import ParallelLayout
from megavar.models.stack import describe_stack, foreign_apex
from megavar.models.switches import check_fp8, check_machine, check_switches, token_multiple

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


@pytest.fixture
def dense(tmp_path: Path) -> Architecture:
    Qwen3Config(**SIZES).save_pretrained(tmp_path / "dense")
    return read_architecture(tmp_path / "dense")


def test_what_megatron_takes_is_passed_on(dense: Architecture) -> None:
    switches = {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "first_last_layers_bf16": True,
        "num_layers_at_end_in_bf16": 2,
        "recompute_modules": ["core_attn", "mlp"],
    }
    config = transformer_config(
        dense,
        Site(ParallelLayout(), torch.device("cpu")),
        dtype=torch.bfloat16,
        recompute="selective",
        switches=switches,
    )
    assert {name: getattr(config, name) for name in switches} == switches
    assert not config.fp8_param and config.params_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        (
            {"fp8_recipie": "mxfp8"},
            "trainer.megatron.fp8_recipie: no field of Megatron-Core .* 'fp8_recipe'?",
        ),
        ({"fp8": "fp8"}, "trainer.megatron.fp8: Input should be 'e4m3' or 'hybrid', got 'fp8'"),
        ({"fp8_margin": True}, "trainer.megatron.fp8_margin: Input should be a valid integer, got True"),
        ({"hidden_size": 8}, "hidden_size is not passed on: it follows from the model"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is not passed on"),
        ({"recompute_granularity": "full"}, "use trainer.recompute"),
        ({"fp8": "hybrid", "fp8_param": True}, "fp8_param is not passed on: weights stay in bfloat16"),
        ({"cuda_graph_impl": "local"}, "replay micro-batches of one shape"),
    ],
)
def test_refused_by_name(switches: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_switches(switches)


def test_what_megatron_refuses_is_said_in_its_words(dense: Architecture) -> None:
    switches = {"fp8": "hybrid", "fp8_recipe": "delayed", "first_last_layers_bf16": True}
    with pytest.raises(UserError, match="Megatron-Core refuses it: Delayed scaling does not support first"):
        site = Site(ParallelLayout(), torch.device("cpu"))
        transformer_config(dense, site, dtype=torch.bfloat16, switches=switches)


@pytest.mark.parametrize(
    ("recipe", "version", "gpus", "said"),
    [
        ("delayed", "2.8.0", [(8, 9)], None),
        ("tensorwise", "2.8.0", [(9, 0)], None),
        ("blockwise", "2.8.0", [(9, 0), (10, 0)], None),
        ("mxfp8", "2.8.0", [(10, 0)], None),
        ("tensorwise", None, [(9, 0)], "needs transformer-engine, which is not installed"),
        ("blockwise", "2.2.1", [(9, 0)], "needs transformer-engine 2.3 or newer, 2.2.1 is installed"),
        ("delayed", "2.8.0", [], "needs GPUs, Hopper or newer .*, and there are none here"),
        ("delayed", "2.8.0", [(8, 0)], "one here has compute capability 8.0"),
        ("mxfp8", "2.8.0", [(9, 0)], "needs Blackwell .* compute capability 9.0"),
        ("mxfp8", "2.8.0", [(10, 0), (12, 0)], "compute capability 12.0"),
    ],
)
def test_fp8_needs_its_gpus(
    recipe: str, version: str | None, gpus: list[tuple[int, int]], said: str | None
) -> None:
    switches = {"fp8": "hybrid", "fp8_recipe": recipe}
    if said is None:
        check_machine(switches, transformer_engine=version, capabilities=lambda: gpus)
    else:
        with pytest.raises(UserError, match=said):
            check_machine(switches, transformer_engine=version, capabilities=lambda: gpus)


def test_fp8_needs_bfloat16_and_sizes_it_can_multiply(dense: Architecture) -> None:
    def check(dtype: str = "bfloat16", tp: int = 1, kind: str = "mxfp8") -> None:
        switches = {"fp8": "hybrid", "fp8_recipe": kind}
        check_fp8(switches, dense, ParallelLayout(ranks=tp, tp=tp), dtype=dtype)

    check()
    check(tp=2, kind="delayed")
    with pytest.raises(UserError, match='needs model.dtype = "bfloat16"'):
        check(dtype="float32")
    with pytest.raises(UserError, match="query heads' columns are 16 on a rank, FP8 .* multiples of 32"):
        check(tp=4)
    with pytest.raises(UserError, match="the MLP's columns are 24 on a rank"):
        check(tp=4, kind="delayed")
    with pytest.raises(UserError, match='fp8_recipe = "custom" is not supported'):
        check(kind="custom")


def test_a_mixtures_experts_have_sizes_of_their_own(tmp_path: Path) -> None:
    Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="an expert's columns are 24 on a rank"):
        check_fp8({"fp8": "e4m3"}, read_architecture(tmp_path), ParallelLayout(), dtype="bfloat16")


def test_tokens_of_a_micro_batch_come_in_multiples() -> None:
    assert token_multiple({}) == token_multiple({"fp8_recipe": "mxfp8"}) == 1
    assert (
        token_multiple({"fp8": "hybrid"}) == token_multiple({"fp8": "e4m3", "fp8_recipe": "blockwise"}) == 16
    )
    assert token_multiple({"fp8": "e4m3", "fp8_recipe": "mxfp8"}) == 32


def test_an_apex_that_is_not_nvidias_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert foreign_apex() is None
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_of_another_kind\n")
    said = describe_stack(torch.device("cpu"), mixture=False, switches={"fp8": "hybrid"})
    assert f"{tmp_path / 'apex'} is not NVIDIA's apex and is ignored: pip uninstall apex" in said
    assert "linear layers: FP8, delayed scaling" in said
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "fused_adam.py").write_text("")
    assert foreign_apex() is None
