"""That every thing which `megavar.parallel` patches has a canary, and the canaries that look at upstream alone."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavar.parallel import adam, cpu

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the adapter does nothing where CUDA is there"
)

CANARIES = {
    "setattr(torch.cuda, name)": "test_stand_ins_replace_names_that_torch_still_has",
    "setattr(owner, name)": "test_tensors_and_modules_stay_where_they_are",
    "torch.cuda.random.get_rng_state": "test_submodules_of_torch_cuda_still_have_the_names",
    "torch.cuda.random.set_rng_state": "test_submodules_of_torch_cuda_still_have_the_names",
    "torch.cuda.nvtx.range_push": "test_submodules_of_torch_cuda_still_have_the_names",
    "torch.cuda.nvtx.range_pop": "test_submodules_of_torch_cuda_still_have_the_names",
    "module.torch": "test_proxied_module_still_asks_for_cuda",
    "random._get_cuda_rng_state": "test_rng_state_helpers_exist_and_round_trip",
    "random._set_cuda_rng_state": "test_rng_state_helpers_exist_and_round_trip",
    "moe_utils.maybe_move_tensor_to_cpu": "test_split_sizes_reach_all_to_all_as_numpy",
    "token_dispatcher.maybe_move_tensor_to_cpu": "test_split_sizes_reach_all_to_all_as_numpy",
    "mappings._gather_along_first_dim": "test_uneven_shares_still_go_through_the_patched_functions",
    "mappings._reduce_scatter_along_first_dim": "test_uneven_shares_still_go_through_the_patched_functions",
    "rope_utils._apply_rotary_pos_emb_thd": "test_packed_rotary_equals_upstreams_loop",
    "param_and_grad_buffer.dist_reduce_scatter_func": (
        "test_gradient_buffers_go_through_the_collectives_in_place"
    ),
    "param_and_grad_buffer.dist_all_gather_func": "test_gradient_buffers_go_through_the_collectives_in_place",
    "clip_grads.multi_tensor_scale_impl": "test_clipping_scales_in_place",
    "optimizer.Adam": "test_distributed_optimizer_takes_the_fused_adam_path",
    "optimizer.USING_PYTORCH_OPTIMIZER": "test_distributed_optimizer_takes_the_fused_adam_path",
    "distrib_optimizer.HAVE_APEX_OR_TE": "test_distributed_optimizer_takes_the_fused_adam_path",
    "distrib_optimizer.USING_APEX_OPTIMIZER": "test_distributed_optimizer_takes_the_fused_adam_path",
}
"""What the adapter assigns, as its source writes it -> the test that fails when upstream changes it."""

UPSTREAM = {
    "tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state"),
    "transformer.moe.moe_utils": ("maybe_move_tensor_to_cpu",),
    "transformer.moe.token_dispatcher": ("maybe_move_tensor_to_cpu",),
    "tensor_parallel.mappings": ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"),
    "models.common.embeddings.rope_utils": ("_apply_rotary_pos_emb_thd",),
    "distributed.param_and_grad_buffer": ("dist_reduce_scatter_func", "dist_all_gather_func"),
    "optimizer.clip_grads": ("multi_tensor_scale_impl",),
    "optimizer": ("Adam", "USING_PYTORCH_OPTIMIZER"),
    "optimizer.distrib_optimizer": ("HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"),
}
"""Module of megatron.core -> names of its that the adapter replaces."""


def patched() -> set[str]:
    """Every attribute of another module or class that the adapter's source assigns."""
    found = set()
    for node in (n for file in (cpu, adam) for n in ast.walk(ast.parse(inspect.getsource(file)))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            found.add(f"setattr({ast.unparse(node.args[0])}, {ast.unparse(node.args[1])})")
        for target in node.targets if isinstance(node, ast.Assign) else ():
            each = target.elts if isinstance(target, ast.Tuple) else [target]
            found |= {ast.unparse(t) for t in each if isinstance(t, ast.Attribute)}
    return {name for name in found if not name.startswith(("self.", "setattr(self"))}


def test_every_patched_symbol_has_a_canary() -> None:
    assert patched() == set(CANARIES)
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_cpu_adapter*.py"))
    missing = {name for name in CANARIES.values() if f"def {name}(" not in tests}
    assert not missing
    written = {
        name.removeprefix("setattr").partition(".")[2] for name in CANARIES if "torch.cuda" not in name
    }
    assert {name for names in UPSTREAM.values() for name in names} == written - {"", "torch"}


@pytest.mark.parametrize("module", UPSTREAM)
def test_upstream_still_has_and_uses_it(module: str) -> None:
    """In the file, since the module that is imported is patched."""
    spec = importlib.util.find_spec(f"megatron.core.{module}")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    for name in UPSTREAM[module]:
        uses = len(re.findall(rf"\b{name}\b", source))
        # What moe_utils defines is used by the dispatcher.
        assert uses > (module != "transformer.moe.moe_utils"), f"megatron.core.{module} no longer uses {name}"


@pytest.mark.parametrize("module", cpu.PROXIED_MODULES)
def test_proxied_module_makes_tensors_on_cuda(module: str) -> None:
    """The word alone could stand in a comment."""
    source = inspect.getsource(importlib.import_module(f"megatron.core.{module}"))
    asks = re.search(r"device\s*=\s*f?[\"']cuda|pin_memory\s*=\s*True|torch\.device\([\"']cuda", source)
    assert asks, f"megatron.core.{module} no longer makes tensors on CUDA: drop it from PROXIED_MODULES"


def test_submodules_of_torch_cuda_still_have_the_names() -> None:
    """Asked of a process that the adapter has not touched; here they do nothing, or answer for the CPU."""
    names = sorted(name for name in CANARIES if name.startswith("torch.cuda."))
    fresh = f"import torch, torch.cuda.nvtx\nfor name in {names}: assert callable(eval(name)), name"
    subprocess.run([sys.executable, "-c", fresh], check=True)
    assert torch.cuda.nvtx.range_push("x") is None and torch.cuda.nvtx.range_pop() is None
    state = torch.cuda.random.get_rng_state()
    first = torch.rand(2)
    torch.cuda.random.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def test_tensors_and_modules_stay_where_they_are() -> None:
    """Megatron-Core moves them to "the device" and pins what it copies from."""
    names = [f"torch.{owner.__name__}.{name}" for owner, name, _ in cpu.tensor_stand_ins()]
    names = [name.replace("torch.Module", "torch.nn.Module") for name in names]
    assert set(names) == {"torch.Tensor.cuda", "torch.nn.Module.cuda", "torch.Tensor.pin_memory"} | {
        "torch.Tensor.type"
    }
    fresh = f"import torch\nfor name in {names}: assert callable(eval(name)), name"
    subprocess.run([sys.executable, "-c", fresh], check=True)
    tensor, module = torch.zeros(2), torch.nn.Linear(2, 2)
    assert tensor.cuda() is tensor and tensor.cuda(0, non_blocking=True) is tensor
    assert tensor.pin_memory() is tensor and module.cuda() is module
