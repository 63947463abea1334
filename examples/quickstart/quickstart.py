"""`make quickstart`: the main job from nothing to an answer, each step the command a user would type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUN, EXPORT = ROOT / "runs" / "quickstart", ROOT / "runs" / "quickstart-export"
MEGAVAR = str(Path(sys.executable).with_name("megavar"))
ARM = "variational-acc"


def step(*command: object) -> None:
    words = [str(word) for word in command]
    print("\n$", " ".join(words).replace(f"{ROOT}/", ""), flush=True)
    subprocess.run(words, check=True, env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"})


def main() -> None:
    try:
        step(sys.executable, HERE / "prepare.py", RUN.with_name("quickstart-inputs"))
        step(MEGAVAR, "run", HERE / "recipe.toml", *sys.argv[1:])
        shutil.rmtree(EXPORT, ignore_errors=True)
        step(MEGAVAR, "export", RUN, EXPORT, "--arm", ARM)
        step(sys.executable, HERE / "ask.py", EXPORT)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
