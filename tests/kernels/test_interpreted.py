"""Runs the checks that need the Triton interpreter: a process must choose it before it imports a kernel."""

import subprocess
import sys
from pathlib import Path

import pytest
from kernel_oracles import child_environment

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", ["check_linear_logprob.py", "check_trace_weights.py"])
def test_kernels_under_the_interpreter(name):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider", FOLDER / name],
        capture_output=True,
        text=True,
        env=child_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS="1"),
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
