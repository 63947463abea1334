"""Measure the paper's claims on tiny models: `python examples/claims/claims.py [CLAIM ...]`, all of them by default.

A claim is named by its TOML beside this file ("estimators") or by a path to one of yours. Each (claim, seed) is kept
when it is done, and what a seed shares between claims lies in a run directory: killed and called again, this goes on
where it was. Raw numbers go to docs/claims/results/, plots to docs/claims/, tables into docs/claims.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from settings import Settings, load_settings  # noqa: E402

from megavar.errors import UserError  # noqa: E402
from megavar.files import write_atomically  # noqa: E402

ORDER = (
    "bounds",
    "posterior_kl",
    "traces",
    "hints",
    "estimators",
    "selection",
    "difficulty",
    "rounds",
    "ratio",
)
"""The claims of docs/claims.md by number."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("claims", nargs="*", default=ORDER, help="names or TOML files")
    parser.add_argument("--workers", type=int, default=1, help="seeds at once, one CPU thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "claims", help="run directories")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where claims.md and claims/ lie")
    args = parser.parse_args()
    try:
        asked = [load_settings(_path(name)) for name in args.claims]
        jobs = sorted({seed for settings in asked for seed in settings.seeds})
        _run([(seed, [s.path for s in asked if seed in s.seeds], args.out) for seed in jobs], args.workers)
        for settings in asked:
            report(settings, args.out, args.docs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _path(name: str) -> Path:
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    return path.resolve()


def _run(jobs: list[tuple[int, list[Path], Path]], workers: int) -> None:
    """All claims of a seed one after the other, since they share a run directory; seeds side by side."""
    if workers == 1:
        for job in jobs:
            run_seed(*job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_worker) as pool:
        seeds = {pool.submit(run_seed, *job): job[0] for job in jobs}
        for done in as_completed(seeds):
            if done.exception():
                print(f"seed {seeds[done]} failed; the seeds in flight are ended first", file=sys.stderr)
                pool.shutdown(wait=False, cancel_futures=True)
            done.result()


def _worker() -> None:
    """One CPU thread, and no life beyond the process that started it, however that ended."""
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_seed(seed: int, paths: list[Path], out: Path) -> None:
    """Measure the claims whose results this seed does not have yet."""
    for path in paths:
        settings = load_settings(path)
        if result_of(settings, seed, out) is not None:
            continue
        began, used = time.monotonic(), time.process_time()
        # Imported here: finished seeds need no torch.
        from replicate import Replicate, single_threaded

        from megavar.launch import quiet_libraries

        quiet_libraries()
        single_threaded()
        module = importlib.import_module(f"claim_{settings.kind}")
        with Replicate.enter(settings, seed, out) as replicate:
            accuracy = replicate.accuracy("initial", replicate.initial())["accuracy"]
            measured = module.measure(replicate) if accuracy >= settings.floor else None
        seconds = time.monotonic() - began
        content = {
            "digest": settings.digest,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
            "initial_accuracy": accuracy,
            "measured": measured,
        }
        result = _result_path(settings, seed, out)
        result.parent.mkdir(exist_ok=True)
        write_atomically(result, json.dumps(content, indent=1) + "\n")
        print(f"{settings.name}, seed {seed}: {seconds:.0f} s", flush=True)


def result_of(settings: Settings, seed: int, out: Path) -> dict[str, Any] | None:
    """What was measured with these settings; None where it was not."""
    path = _result_path(settings, seed, out)
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found["digest"] == settings.digest else None


def _result_path(settings: Settings, seed: int, out: Path) -> Path:
    return out / settings.shared / f"seed-{seed}" / "results" / f"{settings.name}.json"


def report(settings: Settings, out: Path, docs: Path) -> None:
    """Raw numbers, plot, and the block of tables in claims.md."""
    found = {seed: result_of(settings, seed, out) for seed in settings.seeds}
    done = {str(seed): result for seed, result in found.items() if result}
    whole: dict[str, Any] = {
        "claim": settings.name,
        "cpu_seconds": {seed: result["cpu_seconds"] for seed, result in done.items()},
        "passed_over": {s: r["initial_accuracy"] for s, r in done.items() if r["measured"] is None},
        "seeds": {s: r["measured"] for s, r in done.items() if r["measured"] is not None},
    }
    module = importlib.import_module(f"claim_{settings.kind}")
    if hasattr(module, "exact"):
        whole["exact"] = module.exact()
    folder = docs / "claims"
    (folder / "results").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results" / f"{settings.name}.json", json.dumps(whole, indent=1) + "\n")
    if not whole["seeds"]:
        write_block(docs / "claims.md", settings.name, "Every seed was passed over.")
        return
    module.plot(whole, folder / f"{settings.name}.svg")
    write_block(docs / "claims.md", settings.name, module.tables(whole))


def write_block(path: Path, name: str, text: str) -> None:
    """Replace what stands between a claim's two marks."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else f"{start}\n{end}\n"
    if start not in whole:
        whole += f"\n{start}\n{end}\n"
    before, _, rest = whole.partition(start)
    _, _, after = rest.partition(end)
    write_atomically(path, f"{before}{start}\n{text.strip()}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
