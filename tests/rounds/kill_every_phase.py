"""Kill a run once in each of its phases, at a random moment, and compare it with one that was never killed.

    python tests/rounds/kill_every_phase.py examples/quickstart/recipe.toml WORK_DIR [--section.key value ...]

For people, before a release: it takes two runs of the recipe and one start-up per phase. Prints a line per kill and
what differs in the end; exits with 1 where anything does.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from killing import comparable, kill_when, started
from small_recipe import megavar, results

from megavar.cli import split_overrides
from megavar.config.load import load_recipe
from megavar.rounds import phase_names


def main(recipe: Path, work: Path, *options: str) -> int:
    reference, killed = work / "reference", work / "killed"
    _finish(recipe, reference, options)
    draw = random.Random(0)
    for name in phase_names(load_recipe(recipe, split_overrides(options)[1])):
        seconds = json.loads((reference / name / "manifest.json").read_text())["seconds"]
        delay = draw.uniform(0, seconds)
        hit = kill_when(recipe, killed / name, started, *options, "--out", killed, delay=delay)
        print(f"{name:<28} killed {delay:6.2f} s after its start: {hit}", flush=True)
    _finish(recipe, killed, options)
    wanted, found = results(reference), results(killed)
    different = [n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n)]
    different += [n for n, m in _manifests(reference).items() if _manifests(killed).get(n) != m]
    print(f"{len(wanted)} files compared; different: {', '.join(different) or 'none'}")
    return 1 if different else 0


def _finish(recipe: Path, out: Path, options: tuple[str, ...]) -> None:
    done = megavar("run", recipe, *options, "--out", out, timeout=7200)
    print(done.stdout or done.stderr, flush=True)
    if done.returncode:
        sys.exit(done.returncode)


def _manifests(run: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in run.rglob("manifest.json"))
    return {f"{m['phase']}/manifest.json": comparable(m) for m in found}


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
