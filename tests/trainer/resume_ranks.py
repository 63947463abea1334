"""Run by torchrun: fits that are stopped under one layout and go on under another; checkpoints as files.

Each rank compares its own part of the weights; rank 0 prints the worst of all.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from te_stubs import te_layer_spec

from megavar import preemption
from megavar.config.recipe import Fit
from megavar.data.training_set import TrainingSet
from megavar.errors import UserError
from megavar.models import build
from megavar.models.parallel_layout import ParallelLayout
from megavar.parallel import groups as groups_module
from megavar.parallel.groups import Groups
from megavar.trainer import checkpoint
from megavar.trainer.fit import Stretch, fit_model
from megavar.trainer.model import Model, Settings, load_model

STOP, STEPS = 3, 6
DENSE = {
    "dp4": dict(),
    "tp2 dp2": dict(tp=2),
    "tp2 pp2": dict(tp=2, pp=2),
    "pp2 dp2": dict(pp=2),
    "pp2 vpp2 dp2": dict(pp=2, vpp=2),
    "cp2 tp2": dict(cp=2, tp=2),
    "dp4 te": dict(),
}
DENSE_MOVES = (
    ("tp2 dp2", "tp2 dp2"),
    ("tp2 dp2", "pp2 dp2"),
    ("tp2 pp2", "dp4"),
    ("dp4", "tp2 dp2"),
    ("pp2 dp2", "pp2 vpp2 dp2"),
    ("pp2 vpp2 dp2", "cp2 tp2"),
    ("cp2 tp2", "tp2 pp2"),
    ("tp2 dp2", "dp4 te"),
    ("dp4 te", "pp2 dp2"),
)
MIXTURE = {
    "dp4": dict(),
    "ep2": dict(ep=2),
    "ep4": dict(ep=4),
    "ep2 pp2": dict(ep=2, pp=2),
    "dp4 te": dict(),
}
MIXTURE_MOVES = (
    ("ep2", "ep2"),
    ("ep2", "dp4"),
    ("dp4", "ep2"),
    ("ep4", "ep2 pp2"),
    ("ep2", "dp4 te"),
    ("dp4 te", "ep2"),
)
OUR_LAYERS = build._layer_spec
FIT = Fit(questions_per_step=3, steps=STEPS, lr=3e-3, checkpoint_every=0, warmup=0.25, weight_decay=0.1)


class Job:
    """Fits of one model on one training set."""

    def __init__(self, hf: Path, training_file: Path, work: Path, dtype: str = "float32") -> None:
        self.hf, self.training_set, self.work, self.dtype = hf, TrainingSet(training_file), work, dtype
        self.losses: list[float] = []
        self.groups: Groups | None = None

    def place(self, sizes: dict[str, int]) -> Groups:
        """Process groups, made anew where the layout is another one."""
        layout = ParallelLayout(ranks=4, **sizes)
        if self.groups is None or self.groups.layout != layout:
            self.groups = groups_module.initialize(layout)
        return self.groups

    def fit(
        self,
        sizes: dict[str, int],
        checkpoints: Path,
        *,
        fit: Fit = FIT,
        stop_at: int | None = None,
        each_step: Callable[[int], None] = lambda step: None,
        **more: object,
    ) -> Model:
        """The model after the fit; `losses` are of the steps that this call took. Asked to stop on one rank."""
        self.losses = []
        groups = self.place(sizes)
        model = load_model(self.hf, groups, Settings(dtype=self.dtype))

        def report(step: int, steps: int, metrics: dict[str, float]) -> None:
            self.losses.append(metrics["train/loss"])
            each_step(step)
            if step == stop_at and groups.rank == 2:
                preemption._requested = True

        try:
            fit_model(model, self.training_set, fit, tokens_per_micro_batch=100, seed=5, checkpoints=checkpoints,
                      report=report, **{"data": "d", **more})  # type: ignore[arg-type]  # fmt: skip
            assert stop_at is None
        except preemption.Preempted:
            assert len(self.losses) == stop_at and checkpoint.latest_step(checkpoints) == stop_at
        preemption._requested = False
        return model


def parameters(model: Model) -> list[torch.Tensor]:
    return [p.detach().clone() for chunk in model.chunks for p in chunk.parameters()]


def worst(value: float) -> float:
    seen = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return float(seen)


def moves(job: Job, layouts: dict[str, dict], wanted: tuple[tuple[str, str], ...]) -> dict[str, dict]:
    """Relative errors of losses and weights of a fit that moved, against one that was in its new place all along.

    " te" in a name: layers as Megatron puts them together where transformer-engine is installed; others are ours.
    """
    whole, stopped = {}, {}

    def fit(name: str, checkpoints: Path, stop_at: int | None = None) -> Model:
        build._layer_spec = te_layer_spec if name.endswith(" te") else OUR_LAYERS
        return job.fit(layouts[name], checkpoints, stop_at=stop_at)

    for name in dict.fromkeys(name for move in wanted for name in move):
        if name in {target for _, target in wanted}:
            model = fit(name, job.work / "none")
            whole[name] = (job.losses, parameters(model))
        if name in {source for source, _ in wanted}:
            stopped[name] = job.work / name.replace(" ", "-")
            fit(name, stopped[name], STOP)
    errors = {}
    for source, target in wanted:
        losses, weights = whole[target]
        model = fit(target, stopped[source])
        assert len(job.losses) == STEPS - STOP
        loss = max(abs(a - b) / abs(b) for a, b in zip(job.losses, losses[STOP:], strict=True))
        got = parameters(model)
        weight = max(float((a - b).norm() / b.norm()) for a, b in zip(got, weights, strict=True))
        equal = job.losses == losses[STOP:] and all(map(torch.equal, got, weights))
        errors[f"{source} -> {target}"] = {
            "loss": worst(loss), "weights": worst(weight), "bitwise": worst(not equal) == 0
        }  # fmt: skip
    build._layer_spec = OUR_LAYERS
    return errors


def files(job: Job) -> dict:
    """What lies on disk at each step of a fit that writes a checkpoint every step, and what is refused."""
    fit, place = FIT.model_copy(update={"checkpoint_every": 1, "checkpoint_keep": 2}), job.work / "files"
    latest: list[int] = []
    kept: list[list[int]] = []

    def look(step: int) -> None:
        latest.append(checkpoint.latest_step(place) or 0)
        kept.append(
            sorted(int(p.parent.name.removeprefix("step-")) for p in place.glob("step-*/manifest.json"))
        )

    model = job.fit({"tp": 2}, place, fit=fit, each_step=look)
    weights = parameters(model)
    report: dict = {"latest": latest, "kept": kept}
    newest = place / "step-000005"

    def refusal(**more: object) -> str:
        try:
            job.fit({"tp": 2}, place, **{"fit": fit, **more})  # type: ignore[arg-type]
        except UserError as error:
            return str(error)
        return "none"

    report["other fit"] = refusal(fit=fit.model_copy(update={"lr": 1e-3, "checkpoint_keep": 1}))
    report["other data"] = refusal(data="e")
    dist.barrier()
    shard = max(newest.glob("*.distcp"))
    if dist.get_rank() == 0:
        with shard.open("r+b") as file:
            file.truncate(100)
    dist.barrier()
    report["torn"] = refusal()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(newest)
    dist.barrier()
    again = parameters(job.fit({"tp": 2}, place, fit=fit))
    report["from the one before"] = len(job.losses)
    report["same weights"] = worst(not all(map(torch.equal, again, weights))) == 0
    return report


def killed_while_writing(job: Job) -> dict:
    """A fit that dies after step 4, when the checkpoint of step 3 is on its way to the disk, and goes on."""
    fit, place = FIT.model_copy(update={"checkpoint_every": 1}), job.work / "killed"

    class Killed(Exception):
        pass

    def die(step: int) -> None:
        if step == 4:
            raise Killed

    whole = parameters(job.fit({"tp": 2}, job.work / "none"))
    losses = job.losses
    try:
        job.fit({"tp": 2}, place, fit=fit, each_step=die)
    except Killed:
        pass
    found = checkpoint.latest_step(place)
    dist.barrier()
    if dist.get_rank() == 0:
        for half in place.glob("step-000003/*.distcp"):
            half.write_bytes(b"half")  # where the writing came to an end
    dist.barrier()
    again = parameters(job.fit({"tp": 2}, place, fit=fit))
    return {
        "latest": found,
        "losses": job.losses == losses[found:],
        "weights": worst(not all(map(torch.equal, again, whole))) == 0,
    }


def stretches(job: Job) -> bool:
    """A fit in two stretches, the second under another layout and from another directory of weights' state."""
    whole = parameters(job.fit({"pp": 2}, job.work / "none"))
    after = job.work / "state"
    job.fit({"tp": 2}, job.work / "none", stretch=Stretch(first=0, last=2, steps=STEPS), after=after)
    assert len(job.losses) == 2
    model = job.fit(
        {"pp": 2}, job.work / "none", stretch=Stretch(first=2, last=STEPS, steps=STEPS), before=after
    )
    assert len(job.losses) == STEPS - 2
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(parameters(model), whole, strict=True))
    return worst(error) < 1e-4


def main() -> None:
    dense, mixture, training_file, work = (Path(a) for a in sys.argv[1:5])
    groups_module.initialize(ParallelLayout(ranks=4))
    job = Job(dense, training_file, work / "dense")
    report = {
        "dense": moves(job, DENSE, DENSE_MOVES),
        "files": files(job),
        "killed while writing": killed_while_writing(job),
        "stretches": stretches(job),
        "mixture": moves(Job(mixture, training_file, work / "mixture"), MIXTURE, MIXTURE_MOVES),
        "bfloat16": moves(
            Job(dense, training_file, work / "bf16", "bfloat16"), DENSE,
            (("tp2 dp2", "tp2 dp2"), ("tp2 dp2", "pp2 dp2")),
        ),
    }  # fmt: skip
    if dist.get_rank() == 0:
        print("REPORT " + json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
