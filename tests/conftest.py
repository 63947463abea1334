"""What tests of several rooms share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def torchrun():
    """Run a script on several gloo ranks; returns what rank 0 printed after "REPORT " as an object."""

    def run(script: Path, *args: object, ranks: int, timeout: float = 600) -> dict:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*command, str(script), *map(str, args)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        reports = [
            line.removeprefix("REPORT ") for line in done.stdout.splitlines() if line.startswith("REPORT ")
        ]
        assert done.returncode == 0 and reports, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return json.loads(reports[-1])

    return run
