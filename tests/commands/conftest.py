"""A tiny Qwen3 with its tokenizer, and the command as a user types it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model/` (float32, 2 layers) and `train.jsonl`, made as the quickstart makes them."""
    out = tmp_path_factory.mktemp("inputs")
    script = ROOT / "examples/quickstart/prepare.py"
    subprocess.run(
        [sys.executable, str(script), str(out), "--questions", "40"],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return out


@pytest.fixture(scope="session")
def megavar() -> Command:
    """Starts one command; `finish` waits for it."""

    def start(*words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "megavar.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.fixture(scope="session")
def finish() -> Callable[[subprocess.Popen[str]], str]:
    """What a command printed; it must end well."""

    def wait(command: subprocess.Popen[str]) -> str:
        out, err = command.communicate(timeout=300)
        assert command.returncode == 0, err[-4000:]
        return out

    return wait


@pytest.fixture(scope="session")
def refused() -> Callable[[subprocess.Popen[str]], str]:
    """The one line that a command ends with for bad input."""

    def wait(command: subprocess.Popen[str]) -> str:
        out, err = command.communicate(timeout=300)
        assert (command.returncode, out) == (2, ""), err[-4000:]
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return wait


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    """tools/convert_checkpoint.py, in this process."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools/convert_checkpoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def convert(tool: ModuleType) -> Callable[..., None]:
    def run(*words: object) -> None:
        assert tool.run(tool.parse([str(word) for word in words])) == 0

    return run
