"""The run directory, its phases and locks, the metrics file and the progress lines."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from megavar import files, progress
from megavar.config import recipe as r
from megavar.errors import UserError
from megavar.metrics import Metrics, read_metrics
from megavar.runs import TABLE, Phase, RunDirectory, phase_status


def recipe(out: Path, **changed: object) -> r.Recipe:
    source = r.QuestionSource(kind="jsonl", path=Path("/data/q.jsonl"))
    sections = {"model": r.Model(path=Path("/base")), "data": r.Data(train=source, eval=source)}
    return r.Recipe(out=out, **{**sections, **changed})  # type: ignore[arg-type]


def play(out: Path, config: dict[str, object], log: list[str]) -> dict[str, Phase]:
    """A run of three phases a -> b -> c/x; b's config varies."""
    with RunDirectory.attach(out, writer=True) as run:
        phases: dict[str, Phase] = {}
        for name, settings, needs in (("a", {"n": 1}, ""), ("b", config, "a"), ("c/x", {}, "b")):
            phase = run.phase(name, config=settings, inputs=[phases[needs]] if needs else [])
            if not phase.done:
                log.append(name)
                (phase.path / "part-0").write_text("rows")
                phase.finish({"questions": 3}, {"loss": 0.5})
            phases[name] = phase
        return phases


def test_a_phase_is_run_once_and_a_change_redoes_it_and_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    RunDirectory.open(recipe(out)).close()
    log: list[str] = []
    phases = play(out, {"lr": 1}, log)
    assert log == ["a", "b", "c/x"]
    manifest = phases["b"].manifest
    assert manifest is not None
    assert manifest["counts"] == {"questions": 3} and manifest["metrics"] == {"loss": 0.5}
    assert manifest["files"] == {"part-0": 4}
    assert manifest["inputs"].keys() == {"a"}
    assert manifest["versions"].keys() == {"megavar", "torch", "transformers", "megatron-core"}

    log.clear()
    (out / TABLE).write_text("{}")
    play(out, {"lr": 1}, log)
    play(out, {"lr": 1, "checkpoint_every": 7}, log)  # changes no result
    assert log == [] and (out / TABLE).exists()

    capsys.readouterr()
    play(out, {"lr": 2}, log)
    assert log == ["b", "c/x"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "b: config or inputs changed; kept as b.stale-1",
        "c/x: config or inputs changed; kept as c/x.stale-1",
    ]
    assert not (out / TABLE).exists(), "it was of the other b"
    assert (out / "b.stale-1/part-0").exists() and (out / "c/x.stale-1/manifest.json").exists()
    play(out, {"lr": 3}, log)
    assert (out / "b.stale-2").is_dir()
    run = RunDirectory.attach(out, writer=False)
    assert [p.relative_to(out).as_posix() for p in run.phases()] == ["a", "b", "c/x"]


def test_a_restored_part_redoes_nothing_behind_it_unless_its_bytes_differ(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunDirectory.open(recipe(out)).close()
    log: list[str] = []
    phases = play(out, {}, log)
    first = (out / "a/manifest.json").read_text()
    (out / "a/part-0").unlink()
    log.clear()
    time.sleep(0.01)
    again = play(out, {}, log)
    assert log == ["a"]
    assert (out / "a/manifest.json").read_text() != first, "its times are new"
    assert {name: p.hash for name, p in again.items()} == {name: p.hash for name, p in phases.items()}
    assert not list(out.rglob("*.stale-*"))
    # As from an engine that repeats nothing: same size, other bytes.
    with RunDirectory.attach(out, writer=True) as run:
        (out / "a/manifest.json").unlink()
        (out / "a/part-0").write_text("word")
        run.phase("a", config={"n": 1}).finish({"questions": 3}, {"loss": 0.5})
    log.clear()
    play(out, {}, log)
    assert log == ["b", "c/x"]


def test_a_torn_phase_keeps_its_parts_and_a_damaged_one_is_not_done(tmp_path: Path) -> None:
    RunDirectory.open(recipe(tmp_path / "run")).close()
    with RunDirectory.attach(tmp_path / "run", writer=True) as run:
        first = run.phase("a", config={"n": 1})
        (first.path / "part-0").write_text("rows")
        again = run.phase("a", config={"n": 1})
        assert not again.done and (again.path / "part-0").read_text() == "rows"
        assert phase_status(again.path) == ("not finished", None)
        with pytest.raises(ValueError, match="not finished"):
            run.phase("b", config={}, inputs=[again])
        again.finish({}, {})
        assert first.done and phase_status(first.path)[0] == "finished"
        (first.path / "part-0").write_text("row")
        assert not first.done and phase_status(first.path)[0] == "files are missing"
        (first.path / "phase.json").write_text("{")
        with pytest.raises(UserError, match="phase.json: damaged"):
            run.phase("a", config={"n": 1})
        for name in ("../a", "a b", "", "a/", "b.stale-1"):
            with pytest.raises(ValueError, match="cannot be a phase name"):
                run.phase(name, config={})


def test_a_kill_between_directory_and_phase_file_leaves_nothing_stale(tmp_path: Path) -> None:
    RunDirectory.open(recipe(tmp_path / "run")).close()
    (tmp_path / "run/a").mkdir()
    (tmp_path / "run/a/.phase.json.1.tmp").write_text("{")
    with RunDirectory.attach(tmp_path / "run", writer=True) as run:
        phase = run.phase("a", config={})
        phase.finish({}, {})
        assert phase.manifest is not None and phase.manifest["files"] == {}
    assert not (tmp_path / "run/a.stale-1").exists()


def test_a_reader_waits_for_the_writer_and_agrees_with_it(tmp_path: Path) -> None:
    RunDirectory.open(recipe(tmp_path / "run")).close()
    reader = RunDirectory.attach(tmp_path / "run", writer=False)
    opened: list[Phase] = []
    thread = threading.Thread(target=lambda: opened.append(reader.phase("a", config={"n": 1})))
    thread.start()
    with RunDirectory.attach(tmp_path / "run", writer=True) as run:
        run.phase("a", config={"n": 2}).finish({}, {})  # of another hash: not what the reader waits for
        time.sleep(0.1)
        assert opened == []
        phase = run.phase("a", config={"n": 1})
        thread.join(10)
        assert opened[0].hash == phase.hash
        opened[0].finish({}, {})
        assert not phase.done  # only the writer writes
        phase.finish({}, {})
        assert opened[0].done


def test_a_changed_recipe_is_refused_once_there_is_something_to_protect(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunDirectory.open(recipe(out)).close()
    changed = recipe(out, final=r.Fit(lr=0.5, questions_per_step=192))
    RunDirectory.open(changed).close()
    RunDirectory.open(recipe(out)).close()
    play(out, {}, [])
    with pytest.raises(UserError, match=r"(?s)another recipe.*\n  final\.lr: 1e-05 -> 0\.5\n.*--force"):
        RunDirectory.open(changed)
    RunDirectory.open(recipe(out, name="renamed", initial=r.Fit(checkpoint_every=1))).close()
    assert RunDirectory.attach(out, writer=False).recipe.name == "renamed"
    RunDirectory.open(changed, force=True).close()
    assert RunDirectory.attach(out, writer=False).recipe == changed
    (out / "recipe.toml").write_text("[gone]\nkey = 1\n")  # of a version that knew other keys
    with pytest.raises(UserError, match=r"gone\.key: 1 -> \(none\)"):
        RunDirectory.open(changed)
    RunDirectory.open(changed, writer=True, force=True).close()
    assert RunDirectory.open(changed, writer=False).recipe == changed


def test_a_directory_that_cannot_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot write to it: Not a directory; set --out"):
        RunDirectory.open(recipe(tmp_path / "file/run"))
    with pytest.raises(UserError, match="neither empty nor a run directory"):
        RunDirectory.open(recipe(tmp_path))
    with pytest.raises(UserError, match="/proc/run: cannot write"):
        RunDirectory.open(recipe(Path("/proc/run")))


def test_locks_name_their_holder_and_die_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    RunDirectory.open(recipe(out)).close()
    code = (
        "import sys, time; from pathlib import Path; from megavar.runs import RunDirectory as R\n"
        "run = R.attach(Path(sys.argv[1]), writer=True); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        monkeypatch.setattr(files, "GRACE_SECONDS", 0.2)
        openings = (lambda: RunDirectory.open(recipe(out)), lambda: RunDirectory.attach(out, writer=True))
        for attempt in openings:
            with pytest.raises(UserError, match=rf"process {holder.pid} on .*; wait for it or stop it"):
                attempt()
        RunDirectory.attach(out, writer=False)
    finally:
        holder.kill()
        holder.wait()
    with RunDirectory.open(recipe(out)):
        with pytest.raises(UserError, match="another `megavar run` uses it"):
            RunDirectory.open(recipe(out))
        RunDirectory.attach(out, writer=True).close()  # the launcher's own rank


def test_atomic_writes_never_show_half_a_file(tmp_path: Path) -> None:
    """Of a process that replaces a file all the time until it is killed, a reader sees whole files only."""
    path = tmp_path / "f"
    code = (
        "import sys; from pathlib import Path; from megavar.files import write_atomically as w\n"
        "i = 0\nwhile True:\n    i += 1; w(Path(sys.argv[1]), str(i % 10) * 200_000)"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(50):
            text = path.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        text = path.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1


def test_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 5):
        metrics.log("initial", step, {"train/loss": 1.0 / step, "perf/tokens": step})
    metrics.log("b", 9, {"vr/ess": float("nan"), "eval/bound": float("-inf")})
    with pytest.raises(ValueError, match="not under train/, rollout/"):
        metrics.log("b", 0, {"loss": 1.0})
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"time": 1, "pha')  # killed while writing
    assert len(list(read_metrics(path))) == 5

    metrics = Metrics(path)  # resumed at step 2
    metrics.rewind("initial", 2)
    metrics.log("initial", 3, {"train/loss": 7.0})
    lines = [(line["phase"], line["step"], line.get("train/loss")) for line in read_metrics(path)]
    assert lines == [("initial", 1, 1.0), ("initial", 2, 0.5), ("b", 9, None), ("initial", 3, 7.0)]
    line = list(read_metrics(path))[2]
    assert (line["vr/ess"], line["eval/bound"]) == ("nan", "-inf")
    assert all(json.loads(text) for text in path.read_text().splitlines())

    # Killed between the manifest and its line: the next run writes it, once; a phase that begins anew has none left.
    metrics.log("initial", 0, {"train/final_loss": 7.0})
    for _ in range(2):
        metrics.passed("initial", {"train/final_loss": 7.0})
        metrics.passed("data", {"train/normaliser": 2.0})
    lines = [(line["phase"], line["step"]) for line in read_metrics(path)]
    assert lines == [("initial", 1), ("initial", 2), ("b", 9), ("initial", 3), ("initial", 0), ("data", 0)]
    metrics.rewind("initial")
    assert [line["phase"] for line in read_metrics(path)] == ["b", "data"]
    path.write_bytes(path.read_bytes() + b"\0\0\n")  # as a machine that lost power leaves it
    for reader in (Metrics, lambda p: list(read_metrics(p))):
        with pytest.raises(UserError, match=r"metrics.jsonl:3: damaged \(.*\); remove the line"):
            reader(path)
    silent = Metrics(tmp_path / "none", writer=False)
    silent.log("a", 0, {"train/x": 1})
    silent.rewind("a")
    assert not (tmp_path / "none").exists()


def test_plain_progress_is_one_line_per_phase_and_few_between(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    shown = progress.Progress(console=Console(file=out, width=40))
    with shown.phase("initial", 500, done=100) as task:
        for _ in range(400):
            task.advance(loss=0.25)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with pytest.raises(RuntimeError), shown.phase("rollout/posterior", 4, "questions") as task:
        task.advance(2, kept="1/2")
        raise RuntimeError
    shown.already("posterior", 71.0)
    first, between, last, already = out.getvalue().splitlines()
    assert first.startswith("initial") and "500/500 steps" in first and first.endswith("loss 0.25")
    assert "2/4 questions" in between and "to go" in between
    assert last.endswith("stopped")
    assert already.endswith("finished earlier in 1 min 11 s")
    assert progress.duration(3900) == "1 h 05 min"


def test_terminal_progress_ends_in_one_finished_line() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with progress.Progress(console=console).phase("initial", 2) as task:
        task.advance(2)
    assert out.getvalue().rstrip().splitlines()[-1].rpartition("\r")[2].endswith(" s")
    assert os.linesep in out.getvalue()
