"""`megavar doctor`: what it says of this machine, and of what machines with GPUs report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megavar.config.recipe import Data, Model, QuestionSource, Recipe, Rollout, Trainer
from megavar.config.rollout import Servers
from megavar.doctor.check import Check, as_json, failed
from megavar.doctor.engine import check_engine_environment, check_servers, pins
from megavar.doctor.gpus import check_driver, check_infiniband, list_ports, parse_gpus
from megavar.doctor.machine import check_disk
from megavar.doctor.recipe import bytes_on_disk, check_memory, check_processes
from megavar.models.architecture import read_architecture

ROOT = Path(__file__).parents[2]


def doctor(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megavar.cli", "doctor", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inputs")
    prepare = [sys.executable, str(ROOT / "examples/quickstart/prepare.py"), str(out), "--questions", "40"]
    subprocess.run(prepare, check=True, capture_output=True)
    return out


def small(inputs: Path, **changes: object) -> Recipe:
    source = QuestionSource(kind="jsonl", path=inputs / "train.jsonl")
    model = Model(path=inputs / "model", dtype="float32")
    return Recipe(model=model, data=Data(train=source, eval=source), out=inputs / "run", **changes)  # type: ignore[arg-type]


def test_a_recipe_that_runs_here_and_the_same_one_with_three_faults(inputs: Path, tmp_path: Path) -> None:
    recipe = ROOT / "examples/quickstart/recipe.toml"
    own = [
        "--model.path",
        inputs / "model",
        "--data.train.path",
        inputs / "train.jsonl",
        "--out",
        tmp_path / "run",
    ]
    done = doctor(recipe, *own, "--json")
    report = json.loads(done.stdout)
    found = {(check["group"], check["name"]): check for check in report["checks"]}
    assert done.returncode == 0 and report["ok"] is True, done.stdout
    assert found["software", "torch"]["found"] == importlib.metadata.version("torch")
    assert found["recipe", "disk"]["status"] == found["recipe", "run directory"]["status"] == "ok"
    assert not (tmp_path / "run").exists()

    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        own[-1] = tmp_path / "file"
        port = str(taken.getsockname()[1])
        words = [
            "--data.train.options.x",
            "1",
            "--trainer.ranks",
            "3",
            "--nodes",
            "2",
            "--rollout.engine",
            "sglang",
        ]
        words += ["--rollout.servers.venv", tmp_path / "none"]
        done = doctor(recipe, *own, *words, MASTER_PORT=port)
    assert done.returncode == 1
    fixes = [line for line in done.stdout.splitlines() if line.startswith("fail ")]
    told = "\n".join(fixes)
    assert "MASTER_PORT: choose another" in told
    assert "ranks: --trainer.ranks 4: as many on every node" in told
    assert "run directory: set --out to a directory" in told
    assert "environment: no engine environment at" in told and "make engine-env" in told
    assert len(fixes) == 4


def test_a_recipe_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    done = doctor(tmp_path / "gone.toml")
    assert done.returncode == 2 and done.stdout == "" and "cannot read the recipe" in done.stderr


def test_ranks_and_servers_need_gpus_of_their_own(inputs: Path) -> None:
    def status(gpus: int, nodes: int = 1, **rollout: object) -> str:
        recipe = small(inputs, trainer=Trainer(ranks=8), rollout=Rollout(**rollout))  # type: ignore[arg-type]
        return check_processes(recipe, nodes=nodes, gpus=gpus).status

    assert status(8) == status(4, nodes=2) == status(0) == "ok"
    assert status(4) == status(8, nodes=3) == "fail"
    servers = Servers(count=3, tp=4)
    assert status(8, engine="sglang", servers=servers) == "fail"
    assert status(8, engine="sglang", servers=Servers(count=2, tp=4)) == "ok"
    assert status(8, engine="sglang", servers=servers.model_copy(update={"urls": ("http://e:1",)})) == "ok"


def test_gpu_memory_is_the_plans(inputs: Path) -> None:
    recipe = small(inputs)
    assert check_memory(recipe, 80 * 2**30).status == "ok"
    check = check_memory(recipe, 2**28)
    assert check.status == "fail" and "out of memory" in check.found and check.fix


def test_disk_counts_weights_and_checkpoints(inputs: Path, tmp_path: Path) -> None:
    """0.2M float32 parameters: three fits' weights, and three checkpoints of weights, masters and two moments."""
    recipe = small(inputs)
    stored = sum(path.stat().st_size for path in (inputs / "model").glob("*.safetensors"))
    assert read_architecture(inputs / "model").dtype == "float32"
    assert bytes_on_disk(recipe) == pytest.approx(stored * 3 + stored * 4 * 3, rel=1e-6)
    space, locks = check_disk(tmp_path / "not" / "yet", needed=2**70)
    assert (space.status, locks.status) == ("fail", "ok") and str(tmp_path) in space.found


def test_what_nvidia_smi_says_is_read() -> None:
    text = (
        "0, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 4, 9.0, Disabled\n"
        "1, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 40021, 9.0, Enabled\n"
        "2, Tesla T4, 570.86.15, 15360, [N/A], 7.5, [N/A]\n"
    )
    gpus = parse_gpus(text)
    assert [gpu.total // 2**20 for gpu in gpus] == [81559, 81559, 15360]
    assert [gpu.mig for gpu in gpus] == [False, True, False]
    assert gpus[1].used == 40021 * 2**20 and (gpus[2].used, gpus[2].capability) == (0, "7.5")
    told = {check.name: check for check in check_driver(gpus)}
    assert told["GPUs"].found.startswith(
        "3 x NVIDIA H100 80GB HBM3 (80 GiB), Tesla T4 (15 GiB), driver 570.86.15"
    )
    assert (told["MIG"].status, told["compute capability"].status) == ("warn", "fail")
    assert told["memory in use"].found == "GPU 1: 39 GiB"


def test_infiniband_ports(tmp_path: Path) -> None:
    """sysfs of a machine with two adapters, one of them down."""
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in {"state": state, "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}.items():
            (port / name).write_text(f"{text}\n")
    ports = list_ports(tmp_path)
    assert [(port.device, port.active) for port in ports] == [("mlx5_0", True), ("mlx5_1", False)]
    check = check_infiniband(ports, gpus=True, nodes=2)
    assert check.status == "warn" and check.found == "1 of 2 ports active: InfiniBand 400 Gb/sec (4X NDR)"
    assert check_infiniband([], gpus=True, nodes=2).status == "warn"
    assert check_infiniband([], gpus=True, nodes=1).status == "ok"
    assert list_ports(tmp_path / "none") == []


def test_engine_environment_is_compared_with_the_pins(tmp_path: Path) -> None:
    assert set(pins()) == {"sglang", "sglang-router"}
    fake = tmp_path / "venv" / "bin"
    fake.mkdir(parents=True)
    (tmp_path / "venv" / "megavar-engine.sha256").write_text("")
    (fake / "python").symlink_to(sys.executable)  # this environment has no SGLang
    for needed, status in ((True, "fail"), (False, "warn")):
        check = check_engine_environment(tmp_path / "venv", needed=needed, gpus=False)
        assert check.status == status and "sglang missing" in check.found and "make engine-env" in check.fix
    assert check_engine_environment(tmp_path / "none", needed=False, gpus=False).status == "ok"


def test_a_server_that_does_not_answer_fails() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    (check,) = check_servers((url,))
    assert check.status == "fail" and check.name == url and check.found == "no answer"


def test_a_machine_of_servers_needs_no_torch() -> None:
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from megavar.cli import main; "
    words = [sys.executable, "-c", f"{blocked}sys.exit(main(['doctor', '--engine', '--json']))"]
    env = {**os.environ, "MEGAVAR_ENGINE_VENV": "/nowhere"}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    report = json.loads(done.stdout)
    groups = {check["group"] for check in report["checks"]}
    assert done.returncode == 1 and groups == {"machine", "network", "gpu", "engine"}
    assert [check["name"] for check in report["checks"] if check["status"] == "fail"] == ["environment"]


def test_json_and_failure() -> None:
    good = Check(group="gpu", name="GPUs", status="warn", found="[none]")
    bad = Check(group="gpu", name="NCCL", status="fail", found="", fix="do")
    assert not failed([good]) and failed([good, bad])
    assert json.loads(as_json([good, bad])) == {
        "ok": False,
        "checks": [
            {"group": "gpu", "name": "GPUs", "status": "warn", "found": "[none]", "fix": ""},
            {"group": "gpu", "name": "NCCL", "status": "fail", "found": "", "fix": "do"},
        ],
    }
