"""One canary per thing that `megavar.parallel.cpu` patches: a Megatron-Core or torch update must fail here, loudly."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megavar.parallel import adam, cpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the adapter does nothing where CUDA is there"
)


def test_stand_ins_replace_names_that_torch_still_has() -> None:
    names = sorted(cpu.cuda_stand_ins())
    fresh = f"import torch; print([n for n in {names} if not callable(getattr(torch.cuda, n, None))])"
    done = subprocess.run([sys.executable, "-c", fresh], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"torch.cuda no longer has {done.stdout}: drop them from the adapter"
    assert all(getattr(torch.cuda, name).__module__ == cpu.__name__ for name in names)


@pytest.mark.parametrize("name", cpu.PROXIED_MODULES)
def test_proxied_module_still_asks_for_cuda(name: str) -> None:
    module = importlib.import_module(f"megatron.core.{name}")
    source = inspect.getsource(module)
    assert "cuda" in source, f"megatron.core.{name} no longer mentions CUDA: drop it from PROXIED_MODULES"
    assert module.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
    assert module.torch.float32 is torch.float32


def test_factories_of_torch_itself_are_untouched() -> None:
    """Wrapping them makes transformers compute wrong rotary frequencies without a word."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    config = Qwen3Config(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8)  # fmt: skip
    got = Qwen3ForCausalLM(config).model.rotary_emb.inv_freq
    want = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 8, 2).float() / 8)
    torch.testing.assert_close(got, want)


def test_type_answers_in_cuda_names_and_still_converts() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_distributed_optimizer_takes_the_fused_adam_path() -> None:
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is adam.FusedAdam and not optimizer.USING_PYTORCH_OPTIMIZER
    source = inspect.getsource(distrib_optimizer)
    for name in ("HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"):
        assert source.count(name) > 1, f"distrib_optimizer no longer reads {name}"


def test_rng_state_helpers_exist_and_round_trip() -> None:
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_split_sizes_reach_all_to_all_as_numpy() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    assert token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True).tolist() == [1, 2]
    assert "as_numpy" in inspect.getsource(
        importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    )


def test_uneven_shares_still_go_through_the_patched_functions() -> None:
    """Experts' tensor parallelism looks them up in `mappings`; with even shares upstream's own run."""
    from megatron.core.tensor_parallel import mappings

    for name in ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"):
        assert getattr(mappings, name).__module__ == cpu.__name__
    source = inspect.getsource(mappings._GatherFromSequenceParallelRegion)
    assert "_gather_along_first_dim(" in source and "_reduce_scatter_along_first_dim(" in source
    upstream = importlib.util.find_spec("megatron.core.tensor_parallel.mappings")
    assert upstream is not None and upstream.origin is not None
    text = Path(upstream.origin).read_text()
    assert "def _gather_along_first_dim(input_, group, output_split_sizes=None" in text
    assert "def _reduce_scatter_along_first_dim(input_, group, input_split_sizes=None" in text


def test_gradient_buffers_go_through_the_collectives_in_place() -> None:
    """That these compute the same is seen by every data-parallel layout in tests/trainer."""
    from megatron.core.distributed import param_and_grad_buffer

    source = inspect.getsource(param_and_grad_buffer._ParamAndGradBucketGroup)
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        assert getattr(param_and_grad_buffer, name).__module__ == "megavar.parallel.gloo"
        assert f"{name}(" in source, f"param_and_grad_buffer no longer calls {name}"


def test_clipping_scales_in_place() -> None:
    from megatron.core.optimizer import clip_grads

    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    for p in weights:
        p.grad = torch.full_like(p, 3.0)
    clip_grads.clip_grad_by_total_norm_fp32(weights, max_norm=1.0, total_norm=4.0)
    for p in weights:
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.75), rtol=1e-5, atol=0.0)
    assert clip_grads.multi_tensor_scale_impl.__module__ == cpu.__name__


def test_packed_rotary_equals_upstreams_loop() -> None:
    """Bit for bit, values and gradients."""
    from megatron.core.models.common.embeddings import rope_utils

    patched = rope_utils._apply_rotary_pos_emb_thd
    (upstream,) = (
        cell.cell_contents
        for cell in patched.__closure__
        if getattr(cell.cell_contents, "__module__", "") == rope_utils.__name__
        and inspect.isfunction(cell.cell_contents)
    )
    assert "_apply_rotary_pos_emb_thd(" in inspect.getsource(rope_utils.apply_rotary_pos_emb)
    lengths = torch.tensor([5, 1, 7, 3])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    torch.manual_seed(0)
    freqs = torch.randn(7, 1, 1, 6)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    found = []
    for rotate in (patched, upstream):
        t = torch.arange(16 * 2 * 8, dtype=torch.float32).view(16, 2, 8).sin().requires_grad_()
        out = rotate(t, cu_seqlens, freqs, rotary_interleaved=False, cp_group=group)
        found.append((out, *torch.autograd.grad(out.square().sum(), t)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torchs_adamw(weight_decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(7, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    optimizers = adam.FusedAdam([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(20):
        gradient = torch.randn(7, dtype=torch.float64)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert optimizers[0].param_groups[0]["step"] == 20
    assert set(optimizers[0].state[ours]) == {"exp_avg", "exp_avg_sq"}
