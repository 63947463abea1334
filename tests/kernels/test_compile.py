"""Every shipped kernel configuration compiles for its architectures without spills; no GPU needed."""

import subprocess
import sys
from pathlib import Path

import pytest
from kernel_oracles import child_environment

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env=child_environment(),
    )


def test_every_configuration_passes():
    result = _run(BENCHMARKS / "compile_check.py")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    for name in ("fused_statistics", "fused_dlogits entropy=True", "chunk_statistics keep=bf16"):
        assert name in rows
    assert "0 failed" in result.stdout


def test_a_configuration_that_does_not_fit_fails_the_check():
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
sys.argv = ["compile_check.py", "--arch", "90"]
import compile_check
launch = compile_check.launch
launch.FUSED_TILE = launch.FUSED_TILE._replace(stages=6)
cases = compile_check.cases
compile_check.cases = lambda: (case for case in cases() if case.name == "fused_statistics")
sys.exit(compile_check.main())
"""
    result = _run("-c", code)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "shared memory" in result.stdout and "1 configurations, 1 failed" in result.stdout
