"""Resumable checkpoints of a fit: written beside the training, and read back under any parallel layout.

    <directory>/step-000100/                 weights and optimizer state, Megatron's sharded format (torch_dist)
    <directory>/step-000100/manifest.json    written last: what fit this is of, and the sizes of its files
    <directory>/latest                       the newest complete one, replaced atomically

Stored is what no layout changes: by the names of the weights their values, float32 copies and Adam's two moments, and
the number of steps. Not stored is what follows from the recipe and the step: the learning rate, the order of the data
and the random streams (see `megavar.trainer.fit`), and the optimizer's parameter groups. Of these Megatron keeps one
list per optimizer, and it makes a second optimizer for experts only where they are split over ranks. Nor is the extra
state of modules, so that a fit goes on with or without transformer-engine; the history of FP8's delayed scaling, the
only extra state that says anything, begins anew.
"""

from __future__ import annotations

import json
import queue
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from megavar.errors import UserError
from megavar.files import write_atomically
from megavar.models.sharded import load_parameters, sharded_parameters
from megavar.trainer.model import Model
from megavar.trainer.optimizer import Training

_LATEST = "latest"
_MANIFEST = "manifest.json"
_SHARDING = "fully_reshardable"

if not hasattr(filesystem_async, "_results_queue"):
    raise ImportError(f"megatron.core's file writer has changed: revise {__name__}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    step: int
    """Steps done; 0 where there was no checkpoint."""
    loss: float
    """Of the last of them."""


class Checkpoints:
    """The checkpoints of one fit. All methods are collective but `written`."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        """identity: JSON-serialisable; all that must be the same for a fit to go on from a checkpoint.

        keep: complete checkpoints that stay; at least 1.
        """
        self._directory = directory
        self._identity = dict(_flatten(json.loads(json.dumps(identity))))
        self._keep = keep
        self._pending: _Pending | None = None

    def resume(self, model: Model, training: Training) -> Resumed:
        """Restore the newest complete checkpoint, whatever layout it was written under.

        Raises:
            UserError: files of it are missing or torn, or it is of another fit; before anything is read of it.
        """
        step = latest_step(self._directory)
        if step is None:
            return Resumed(step=0, loss=float("nan"))
        manifest = self._check(step)
        layout = asdict(model.groups.layout)
        if model.groups.is_main and manifest["layout"] != layout:
            print(
                f"{_directory_of(self._directory, step)}: written under {_sizes(manifest['layout'])}, "
                f"goes on under {_sizes(layout)}",
                file=sys.stderr,
            )
        for optimizer in _optimizers(training):
            _allocate(optimizer)
        state = dist_checkpointing.load(
            _sharded_state(model, training, loading=True), str(_directory_of(self._directory, step))
        )
        for index, chunk in enumerate(model.chunks):
            load_parameters(chunk, state["model"][index])
        for index, optimizer in enumerate(_optimizers(training)):
            own = optimizer.state_dict()
            for group in own["optimizer"]["param_groups"]:
                group["step"] = step
            own |= {"param_state": state[f"moments {index}"], "param_state_sharding_type": _SHARDING}
            optimizer.load_state_dict(own)
        training.schedule.step(increment=step)
        return Resumed(step=step, loss=manifest["loss"])

    def save(self, model: Model, training: Training, *, step: int, loss: float) -> None:
        """Take a copy of the state after `step` steps and begin to write it; training may go on at once.

        The checkpoint counts from `finish` on. One that is still being written is finished first. The copy is in
        host memory; each model-parallel part is gathered on its first data-parallel rank (14 bytes a parameter).
        """
        self.finish()
        target = _directory_of(self._directory, step)
        if model.groups.is_main:
            _remove(target)
            target.mkdir(parents=True)
        dist.barrier()
        # The writer hands its results over through a queue, by default one between processes, served by a process of
        # its own that takes seconds to start. Ours writes in a thread; each time through a queue of its own.
        filesystem_async._results_queue = queue.SimpleQueue()
        request = dist_checkpointing.save(
            _sharded_state(model, training, loading=False),
            str(target),
            async_sharded_save=True,
            async_strategy="mcore",
        )
        assert request is not None
        manifest = {
            "step": step,
            "loss": loss,
            "layout": asdict(model.groups.layout),
            "identity": self._identity,
        }
        self._pending = _Pending(target, manifest, request)

    @property
    def written(self) -> bool:
        """Whether this rank has nothing more to write."""
        return self._pending is None or not self._pending.thread.is_alive()

    def finish(self) -> None:
        """Wait until all ranks have written, then let the checkpoint count and remove those that are too many.

        Raises:
            UserError: a rank could not write; the former checkpoint still counts.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.thread.join()
        try:
            for finalise in pending.request.finalize_fns:
                finalise()
        except CheckpointException as error:
            why = "; ".join(str(e) for e in error.failures.values()) or "another rank's disk"
            raise UserError(
                f"{pending.target}: the checkpoint cannot be written: {why}; the one before it is kept"
            ) from None
        if dist.get_rank() == 0:
            files = {p.name: p.stat().st_size for p in sorted(pending.target.iterdir())}
            write_atomically(
                pending.target / _MANIFEST, json.dumps({**pending.manifest, "files": files}, indent=1)
            )
            write_atomically(self._directory / _LATEST, str(pending.manifest["step"]))
            self._prune()
        dist.barrier()

    def _check(self, step: int) -> dict[str, Any]:
        path = _directory_of(self._directory, step)
        manifest = _manifest(path)
        assert manifest is not None
        for name, size in manifest["files"].items():
            found = (path / name).stat().st_size if (path / name).exists() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise UserError(
                    f"{path}: the checkpoint is damaged: {name} {what}; remove {path} to go on from the one before it"
                )
        stored, asked = manifest["identity"], self._identity
        differ = [
            f"{key}: {stored.get(key, '(none)')} -> {asked.get(key, '(none)')}"
            for key in sorted(stored.keys() | asked.keys())
            if stored.get(key) != asked.get(key)
        ]
        if differ:
            raise UserError(
                f"{path}: a checkpoint of another fit (stored -> asked): {'; '.join(differ)}; "
                f"remove {self._directory} to begin anew"
            )
        return manifest

    def _prune(self) -> None:
        steps = _complete_steps(self._directory)
        for path in self._directory.glob("step-*"):
            if path not in {_directory_of(self._directory, step) for step in steps[-self._keep :]}:
                _remove(path)


class _Pending:
    """A checkpoint that is being written by a thread."""

    def __init__(self, target: Path, manifest: dict[str, Any], request: AsyncRequest) -> None:
        self.target, self.manifest, self.request = target, manifest, request
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # to host memory
        # A rank without any part of the state has nothing to call.
        self.thread = threading.Thread(target=request.async_fn, args=arguments, daemon=True)
        self.thread.start()


def latest_step(directory: Path) -> int | None:
    """Step of the newest complete checkpoint; None when there is none."""
    pointer = directory / _LATEST
    if not pointer.exists():
        return None
    step = int(pointer.read_text())
    if _manifest(_directory_of(directory, step)) is not None:
        return step
    # Somebody removed it: the ones before it are as good.
    return max((s for s in _complete_steps(directory) if s < step), default=None)


def remove(directory: Path) -> None:
    """Called once a fit's result is exported."""
    shutil.rmtree(directory, ignore_errors=True)


def _directory_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def _complete_steps(directory: Path) -> list[int]:
    manifests = (_manifest(path) for path in directory.glob("step-*"))
    return sorted(manifest["step"] for manifest in manifests if manifest is not None)


def _manifest(path: Path) -> dict[str, Any] | None:
    file = path / _MANIFEST
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _remove(path: Path) -> None:
    """Killed half-way, it is not taken for complete."""
    (path / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _optimizers(training: Training) -> list[DistributedOptimizer]:
    """Those with parameters on this rank; of a mixture whose experts are split there are two."""
    chained = training.optimizer.chained_optimizers
    return [optimizer for optimizer in chained if not getattr(optimizer, "is_stub_optimizer", False)]


def _allocate(optimizer: DistributedOptimizer) -> None:
    """Adam makes its moments on its first step, which is taken without gradients; what it moves is loaded after."""
    inner = optimizer.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            if parameter.numel():
                parameter.grad = torch.zeros_like(parameter)
    inner.step()
    inner.zero_grad()


def _sharded_state(model: Model, training: Training, *, loading: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": _SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
    }
    weights = {index: sharded_parameters(chunk, metadata) for index, chunk in enumerate(model.chunks)}
    moments = {
        f"moments {index}": optimizer.sharded_param_state_fully_reshardable(weights, loading, metadata)
        for index, optimizer in enumerate(_optimizers(training))
    }
    if not loading:
        # The moments are copies already; the weights are trained on while they are written.
        for sharded in nested_values(weights):
            if isinstance(sharded.data, torch.Tensor) and sharded.data.device.type == "cpu":
                sharded.data = sharded.data.detach().clone()
    # Where they are gathered on another rank there are none.
    return {"model": weights, **{name: state for name, state in moments.items() if state}}


def _flatten(value: Any, dotted: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, element in value.items():
            yield from _flatten(element, f"{dotted}.{key}" if dotted else key)
    else:
        yield dotted, value


def _sizes(layout: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in layout.items() if size > 1) or "one rank"
