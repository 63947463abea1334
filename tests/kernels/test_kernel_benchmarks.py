"""What the benchmarks do where there is no device; their timings need one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_oracles import child_environment

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"


def test_without_a_device_every_benchmark_exits_with_one_line():
    for name in ("linear_logprob.py", "trace_weights.py"):
        result = subprocess.run(
            [sys.executable, BENCHMARKS / name],
            capture_output=True,
            text=True,
            env=child_environment(CUDA_VISIBLE_DEVICES=""),
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"{name}: needs a CUDA device, none is available\n"


def test_every_peer_computes_the_same_loss_or_says_why_it_cannot_run(monkeypatch):
    spec = importlib.util.spec_from_file_location("kernel_benchmark_peers", BENCHMARKS / "peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    hidden, weight = torch.randn(300, 16), torch.randn(700, 16)
    target = torch.randint(0, 700, (300,))
    expected = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().t(), target)
    peers = {peer.name: peer for peer in module.peers()}
    assert len(peers) == 5 and all(peer.loss or peer.reason for peer in peers.values())
    for name, peer in peers.items():
        if peer.loss and name.startswith("torch"):  # the others need a device
            assert abs(peer.loss(hidden, weight, target) - expected) < 1e-4
    assert set(module.peer_versions()) == set(module.DISTRIBUTIONS)


def test_a_torch_without_mixed_precision_addmm_is_an_error():
    code = """
import torch
torch.__version__ = "2.10.1+cu126"
from megavar_kernels import linear_logprob
data = dict(device="meta")
try:
    linear_logprob(torch.zeros(2, 8, **data), torch.zeros(3, 8, **data), torch.zeros(2, dtype=torch.int64, **data))
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=child_environment()
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("hidden: CUDA tensors need torch >= 2.11 (torch.addmm with out_dtype)")
