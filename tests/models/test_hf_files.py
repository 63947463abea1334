"""What is said of a damaged or foreign checkpoint, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_tiny import write_tiny
from safetensors.torch import load_file, save_file

from megavar.errors import UserError
from megavar.models.architecture import read_architecture
from megavar.models.hf_files import INDEX, SINGLE, check_hf_directory


def check(path: Path) -> dict:
    return check_hf_directory(path, read_architecture(path)).tensors


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "sharded", "qwen2_untied", max_shard_size="20KB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "single", "qwen3_tied")


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


def test_finds_every_tensor(sharded: Path, single: Path) -> None:
    for path in (sharded, single):
        stored: dict[str, torch.Tensor] = {}
        for file in path.glob("*.safetensors"):
            stored |= load_file(file)
        found = check(path)
        assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in stored.items()}
        assert {t.dtype for t in found.values()} == {"float32"}
    assert len({t.file for t in check(sharded).values()}) > 2


def test_truncated_and_overlong_files(sharded: Path) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    for size, said in ((len(whole) - 1, "truncated"), (40, "truncated"), (3, "truncated"), (0, "truncated")):
        last.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{last.name} is .*{said}"):
            check(sharded)
    last.write_bytes(whole + b"0")
    with pytest.raises(UserError, match=f"{last.name} is too long"):
        check(sharded)
    last.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(UserError, match=f"{last.name} has a malformed"):
        check(sharded)
    last.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=f"{last.name} is no safetensors file"):
        check(sharded)
    last.unlink()
    with pytest.raises(UserError, match=rf"{last.name} is missing: .* places \d+ tensors there"):
        check(sharded)


def test_index_that_disagrees(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks tensor model.norm.weight"):
        check(sharded)
    for text in ("{", "{}", "[]"):
        (sharded / INDEX).write_text(text)
        with pytest.raises(UserError, match="is not a safetensors index"):
            check(sharded)


def test_no_weights(single: Path, tmp_path: Path) -> None:
    architecture = read_architecture(single)
    (single / SINGLE).rename(single / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert the .bin weights"):
        check(single)
    with pytest.raises(UserError, match="nowhere does not exist"):
        check_hf_directory(tmp_path / "nowhere", architecture)


def test_wrong_tensors(single: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    edit(single, lambda t: t.update({norm: torch.ones(31)}))
    with pytest.raises(UserError, match=rf"{SINGLE}: tensor {norm} has shape \[31\], .* \[32\]"):
        check(single)
    edit(single, lambda t: t.update({norm: torch.ones(32, dtype=torch.float64)}))
    with pytest.raises(UserError, match=f"tensor {norm} has type F64"):
        check(single)
    edit(single, lambda t: t.pop(norm))
    with pytest.raises(UserError, match=f"tensor {norm} is missing"):
        check(single)


def test_unknown_tensors(single: Path) -> None:
    edit(single, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    known = check(single)
    edit(single, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert set(check(single)) == set(known), "a tied output projection stored twice is the same model"
    edit(single, lambda t: t["lm_head.weight"][5, 7].add_(1))
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        check(single)
    edit(single, lambda t: t.pop("lm_head.weight"))
    edit(single, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(UserError, match="q_proj.bias is unknown to a qwen3 model"):
        check(single)
