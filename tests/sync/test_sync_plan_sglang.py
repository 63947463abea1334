"""The engine's side of the plan against SGLang's own weight loaders, at sizes that no CPU server can run.

(A server on a CPU pads heads and widths, and cannot run expert parallelism.) What agrees here is the oracle that the
property tests hold the plan to.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sync_oracle import engine_shards, hf_model

from megavar.commands import convert
from megavar.commands.stored import Stored
from megavar.models.architecture import read_architecture
from megavar.models.families import layout_table
from megavar.rollout.engine_env import engine_python
from megavar.rollout.process import ServerSpec, server_environment
from megavar.sync.engine_layout import EngineLayout, engine_tensors

HERE = Path(__file__).parent
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
BLOCKS = SMALL | {
    "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 128, "intermediate_size": 512
}  # fmt: skip
MIXTURE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
# name -> published config, what differs from it, [(tp, ep), ...]; vocabularies on both sides of 64 and of 64 tp
MODELS: dict[str, tuple[str, dict, list[tuple[int, int]]]] = {
    "qwen2 tied": ("Qwen2.5-3B", {"vocab_size": 83}, [(1, 1), (8, 1)]),
    "qwen3 untied": ("Qwen3-8B", {"vocab_size": 320}, [(2, 1), (4, 1), (8, 1)]),
    "qwen3 tied": ("Qwen3-4B", {"vocab_size": 60, "num_key_value_heads": 4}, [(2, 1), (4, 1)]),
    "mixture": ("Qwen3-30B-A3B", MIXTURE | {"vocab_size": 200}, [(2, 1), (4, 2), (4, 4), (8, 2)]),
    "tied mixture": ("Qwen3-30B-A3B", MIXTURE | {"vocab_size": 83, "tie_word_embeddings": True}, [(4, 2)]),
}


# whole blocks of fp8 on every rank
QUANTISED: dict[str, tuple[str, dict, list[tuple[int, int]]]] = {
    "fp8": ("Qwen3-8B", {"vocab_size": 83}, [(1, 1), (2, 1)]),
    "fp8 mixture": (
        "Qwen3-30B-A3B",
        {"vocab_size": 83, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2},
        [(2, 1), (2, 2)],
    ),
}


def in_blocks(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint in which an element's bit pattern is its number mod 256, and a scale its block's first number."""
    found = {}
    for name, value in hf.items():
        if name.endswith("_proj.weight"):
            found[name] = value.astype(np.uint8)
            found[f"{name}_scale_inv"] = value[::128, ::128].astype(np.float32)
        else:
            found[name] = (value % 256).astype(np.float32)
    return found


def converted(directory: Path) -> dict[str, torch.Tensor]:
    """A small mixture of random weights, as `convert_checkpoint.py --quantize fp8` writes it."""
    plain = directory.with_name("plain")
    plain.mkdir()
    published, changed, _ = QUANTISED["fp8 mixture"]
    config = json.loads((HERE.parent / "configs" / published / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | BLOCKS | changed))
    shapes = layout_table(read_architecture(plain)).checkpoint
    tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, plain / "model.safetensors")
    stored = Stored(plain, plain, True)
    convert.publish(convert.to_hf(stored, directory, dtype=None, max_file_bytes=1 << 30, fp8=True), directory)
    return load_file(directory / "model.safetensors")


def merged(hf: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What SGLang's one rank makes of them: q, k and v one under the other, gate and up, experts stacked."""
    layer, found = "model.layers.0.", dict(hf)
    for kind in ("weight", "weight_scale_inv"):
        parts = [found.pop(f"{layer}self_attn.{name}_proj.{kind}") for name in "qkv"]
        found[f"{layer}self_attn.qkv_proj.{kind}"] = torch.cat(parts)
        gate, up, down = (
            torch.stack([found.pop(f"{layer}mlp.experts.{e}.{name}_proj.{kind}") for e in range(4)])
            for name in ("gate", "up", "down")
        )
        found[f"{layer}mlp.experts.w13_{kind}"] = torch.cat([gate, up], dim=1)
        found[f"{layer}mlp.experts.w2_{kind}"] = down
    return {
        name: tensor.view(torch.uint8).numpy()
        if tensor.dtype == torch.float8_e4m3fn
        else tensor.float().numpy()
        for name, tensor in found.items()
    }


@pytest.mark.engine
def test_sglang_loads_every_rank_as_the_plan_fills_it(tmp_path: Path) -> None:
    cases, expected = [], []
    for name, (published, changed, sizes) in MODELS.items():
        directory = tmp_path / name.replace(" ", "_")
        directory.mkdir()
        config = json.loads((HERE.parent / "configs" / published / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | SMALL | changed))
        architecture = read_architecture(directory)
        hf = hf_model(architecture)
        np.savez(directory / "model.npz", **{key: value.astype(np.float64) for key, value in hf.items()})
        for tp, ep in sizes:
            cases.append([str(directory), tp, ep, False])
            ranks = [engine_shards(architecture, hf, tp=tp, ep=ep, rank=r, fp8=False) for r in range(tp)]
            expected.append((f"{name} tp={tp} ep={ep}", architecture, ranks))
    for name, (published, changed, sizes) in QUANTISED.items():
        directory = tmp_path / name.replace(" ", "_")
        directory.mkdir()
        config = json.loads((HERE.parent / "configs" / published / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | BLOCKS | changed))
        architecture = read_architecture(directory)
        hf = hf_model(architecture)
        np.savez(directory / "model.npz", **in_blocks(hf))
        for tp, ep in sizes:
            cases.append([str(directory), tp, ep, True])
            ranks = [engine_shards(architecture, hf, tp=tp, ep=ep, rank=r, fp8=True) for r in range(tp)]
            for shards in ranks:
                for parameter in shards.keys() - {n for n in shards if n.endswith("_scale_inv")}:
                    shards[parameter] = shards[parameter] % 256
            table = layout_table(architecture)
            for rank, shards in enumerate(ranks):
                planned = engine_tensors(table, EngineLayout(tp=tp, ep=ep, dtype="fp8"), rank)
                assert {s.name: s.shape for t in planned for s in t.stored("fp8")} == {
                    n: value.shape for n, value in shards.items()
                }
            expected.append((f"{name} tp={tp} ep={ep}", architecture, ranks))
    exported = converted(tmp_path / "exported")
    cases.append([str(tmp_path / "exported"), 1, 1, True])
    done = subprocess.run(
        [str(engine_python()), str(HERE / "sglang_shards.py"), json.dumps(cases), str(tmp_path / "out")],
        env=server_environment(ServerSpec(), []), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    for number, (case, architecture, ranks) in enumerate(expected):
        for rank, oracle in enumerate(ranks):
            loaded = dict(np.load(tmp_path / "out" / str(number) / f"{rank}.npz"))
            if architecture.tied and architecture.is_moe:
                # SGLang gives a tied mixture a head and leaves it unloaded; the plan fills it from the embedding
                assert (loaded.pop("lm_head.weight") == -1).all()
                head = oracle.pop("lm_head.weight")
                np.testing.assert_array_equal(head, oracle["model.embed_tokens.weight"])
            assert loaded.keys() == oracle.keys(), f"{case} rank {rank}"
            for name, value in oracle.items():
                np.testing.assert_array_equal(loaded[name], value, err_msg=f"{case} rank {rank}: {name}")
    loaded = dict(np.load(tmp_path / "out" / str(len(expected)) / "0.npz"))
    want = merged(exported)
    for name in want:
        rows = slice(want[name].shape[0])  # SGLang pads the vocabulary
        np.testing.assert_array_equal(loaded.pop(name)[rows], want[name], err_msg=name)
    assert not loaded
