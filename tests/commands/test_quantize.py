"""Quantised exports: blocks of fp8 as transformers reads them, and nvidia-modelopt's, dequantised here by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megavar.errors import UserError

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("modelopt") is not None


def model(path: Path, kind: type = Qwen3Config, **changes: int) -> Path:
    config = dict(
        vocab_size=160, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(kind(**(config | changes), tie_word_embeddings=False))
    made.to(torch.bfloat16).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@torch.no_grad()
@pytest.mark.parametrize("mixture", [False, True])
def test_transformers_reads_blocks_of_fp8(
    mixture: bool, convert: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128} if mixture else {}
    hf, out = (
        model(tmp_path / "model", Qwen3MoeConfig if mixture else Qwen3Config, **changes),
        tmp_path / "out",
    )
    source = hf
    if not mixture:
        source = tmp_path / "checkpoint"
        convert(hf, "--checkpoint", source)
    convert(source, "--hf", out, "--quantize", "fp8", "--shard-gib", 3e-4)
    want, got = stored(hf), stored(out)
    assert len(list(out.glob("*.safetensors"))) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == got.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in got.values())
    back = {}
    for name, tensor in want.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(got.pop(name), tensor), name
            continue
        elements, scale = got.pop(name), got.pop(f"{name}_scale_inv")
        assert (elements.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        back[name] = (elements.float() * full).bfloat16()
        bound = (tensor.float().abs() / 16).clamp(min=full * 2**-10) * 1.01
        assert ((elements.float() * full - tensor.float()).abs() <= bound).all(), name
    assert not got and f"fp8 ({len(back)} weights) and bfloat16" in capsys.readouterr().out

    ids = torch.arange(48)[None]
    plain = AutoModelForCausalLM.from_pretrained(hf)
    reference = plain(ids).logits.float()
    read = AutoModelForCausalLM.from_pretrained(out)(ids).logits.float()
    save_file({**want, **back}, hf / "model.safetensors", metadata={"format": "pt"})
    by_hand = AutoModelForCausalLM.from_pretrained(hf)(ids).logits.float()
    assert torch.equal(read, by_hand)
    assert 0 < (read - reference).std() < 0.1 * reference.std()


def test_weights_that_are_not_finite_are_named(convert: Callable[..., None], tmp_path: Path) -> None:
    hf = model(tmp_path / "model")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight holds a NaN"):
        convert(hf, "--hf", tmp_path / "out", "--quantize", "fp8")
    assert not (tmp_path / "out").exists()


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """[rows / 2, columns] bytes, an even row in the low half, the next in the high -> [rows, columns]."""
    both = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1).to(torch.int16)
    return torch.where(both > 7, both - 16, both).float()


@pytest.mark.skipif(INSTALLED, reason="nvidia-modelopt is installed")
def test_without_modelopt_the_fix_is_named(convert: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pip install nvidia-modelopt"):
        convert(model(tmp_path / "model"), "--hf", tmp_path / "out", "--quantize", "modelopt-fp8")
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.skipif(not INSTALLED, reason="nvidia-modelopt is not installed (pip install -e '.[gpu]')")
@pytest.mark.parametrize("kind", ["modelopt-fp8", "modelopt-int4"])
def test_weights_are_the_nearest_in_their_blocks(
    kind: str, convert: Callable[..., None], tmp_path: Path
) -> None:
    """In a process of its own: importing modelopt changes Megatron."""
    hf, out = model(tmp_path / "model"), tmp_path / "out"
    convert(hf, "--checkpoint", tmp_path / "checkpoint")
    words = [ROOT / "tools/convert_checkpoint.py", tmp_path / "checkpoint", "--hf", out, "--quantize", kind]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and f"14 weights in {kind}" in done.stdout, done.stderr[-2000:]
    assert {p.name for p in tmp_path.iterdir()} == {"model", "checkpoint", "out"}
    assert (out / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"].lower() == {"modelopt-fp8": "fp8_pb_wo", "modelopt-int4": "w4a16_awq"}[kind]
    want, got = load_file(hf / "model.safetensors"), load_file(out / "model.safetensors")
    for name, tensor in want.items():
        scale = got.get(f"{name}_scale")
        if scale is None:
            assert torch.equal(got[name], tensor), name
            continue
        if kind == "modelopt-fp8":
            assert got[name].dtype == torch.float8_e4m3fn
            # [rows / 128, 1, columns / 128, 1]; three bits of mantissa
            full = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
            error, bound = (got[name].float() * full - tensor.float()).abs(), tensor.float().abs() / 16
            bound = bound.clamp(min=full * 2**-10)
        else:
            full = scale.float().repeat_interleave(128, 1)
            error, bound = (unpacked(got[name]) * full - tensor.float()).abs(), full / 2
        assert (error <= bound * 1.01).all(), name
    assert sum(name.endswith("_scale") for name in got) == 14


def test_widths_that_blocks_do_not_divide_are_refused(convert: Callable[..., None], tmp_path: Path) -> None:
    hf = model(tmp_path / "model", intermediate_size=320)
    with pytest.raises(UserError, match="intermediate_size is 320, which blocks of 128 do not divide"):
        convert(hf, "--hf", tmp_path / "out", "--quantize", "fp8")
