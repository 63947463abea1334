"""GPUs, driver, NCCL and InfiniBand, as the driver and the kernel tell them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megavar.doctor.check import Check, Status

_QUERY = ("index", "name", "driver_version", "memory.total", "memory.used", "compute_cap", "mig.mode.current")
INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    index: int
    name: str
    driver: str
    total: int
    """Bytes of memory."""
    used: int
    """Bytes that somebody else holds now."""
    capability: str
    """Compute capability, such as "9.0"."""
    mig: bool
    """Split into instances; the device itself takes no work then."""

    @property
    def compute_capability(self) -> tuple[int, int]:
        major, minor = self.capability.split(".")
        return int(major), int(minor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of a host channel adapter."""

    device: str
    number: int
    active: bool
    rate: str
    layer: str
    """InfiniBand, or Ethernet for RoCE."""


def list_gpus() -> list[Gpu]:
    """Of nvidia-smi; none where there is no driver. `CUDA_VISIBLE_DEVICES` is torch's to apply, not ours."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Rows of nvidia-smi's `_QUERY` as CSV, memory in MiB."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [
        Gpu(
            index=int(index),
            name=name,
            driver=driver,
            total=_bytes(total),
            used=_bytes(used),
            capability=capability,
            mig=mig == "Enabled",
        )
        for index, name, driver, total, used, capability, mig in rows
    ]


def _bytes(mebibytes: str) -> int:
    """0 where the driver says "[N/A]", as it does of memory that CPU and GPU share."""
    return int(mebibytes) * 2**20 if mebibytes.isdecimal() else 0


def list_ports(root: Path = INFINIBAND) -> list[Port]:
    """Of every adapter under `root`, as sysfs shows them."""
    ports = []
    for folder in sorted(root.glob("*/ports/*")):
        values = {
            name: (folder / name).read_text().strip() if (folder / name).exists() else ""
            for name in ("state", "rate", "link_layer")
        }
        ports.append(
            Port(
                device=folder.parent.parent.name,
                number=int(folder.name),
                active="ACTIVE" in values["state"],
                rate=values["rate"],
                layer=values["link_layer"],
            )
        )
    return ports


def check_gpus(gpus: list[Gpu], *, usable: int) -> list[Check]:
    """usable: those that torch can use (`torch.cuda.device_count()`)."""
    import torch

    built = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    if not gpus:
        found = "none; training runs on the CPU" if usable == 0 else f"{usable}, without nvidia-smi"
        return [Check(group="gpu", name="GPUs", status="ok", found=found)]
    fix = (
        ""
        if usable
        else "install a CUDA build of torch that this driver runs, and check CUDA_VISIBLE_DEVICES"
    )
    found = f"{usable} of {len(gpus)} usable by {built}"
    status: Status = "ok" if usable else "fail"
    sees = Check(group="gpu", name="in torch", status=status, found=found, fix=fix)
    return [*check_driver(gpus), sees, _nccl()]


def check_driver(gpus: list[Gpu]) -> list[Check]:
    """What the driver says of the devices."""
    if not gpus:
        return [Check(group="gpu", name="GPUs", status="ok", found="none")]
    kinds = sorted({f"{gpu.name} ({gpu.total / 2**30:.0f} GiB)" for gpu in gpus})
    found = f"{len(gpus)} x {', '.join(kinds)}, driver {gpus[0].driver}"
    checks = [Check(group="gpu", name="GPUs", status="ok", found=found)]
    if any(gpu.mig for gpu in gpus):
        fix = "a split device gives no rank a whole one: an administrator can turn MIG off"
        checks.append(Check(group="gpu", name="MIG", status="warn", found="on", fix=fix))
    old = [gpu for gpu in gpus if float(gpu.capability) < 8.0]
    if old:
        found = f"{old[0].name} has {old[0].capability}"
        fix = "bfloat16 and the kernels need 8.0 (A100) or newer; hide it with CUDA_VISIBLE_DEVICES"
        checks.append(Check(group="gpu", name="compute capability", status="fail", found=found, fix=fix))
    busy = [gpu for gpu in gpus if gpu.used > 0.05 * gpu.total]
    if busy:
        found = ", ".join(f"GPU {gpu.index}: {gpu.used / 2**30:.0f} GiB" for gpu in busy)
        fix = "somebody's processes hold it: nvidia-smi lists them"
        checks.append(Check(group="gpu", name="memory in use", status="warn", found=found, fix=fix))
    return checks


def _nccl() -> Check:
    import torch

    if not torch.distributed.is_nccl_available():
        fix = "install a CUDA build of torch"
        return Check(group="gpu", name="NCCL", status="fail", found="torch has none", fix=fix)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return Check(group="gpu", name="NCCL", status="ok", found=version)


def check_infiniband(ports: list[Port], *, gpus: bool, nodes: int) -> Check:
    """Several nodes of GPUs want a fabric; one node does not."""
    active = [port for port in ports if port.active]
    if active:
        kinds = sorted({f"{port.layer} {port.rate}" for port in active})
        found = f"{len(active)} of {len(ports)} ports active: {', '.join(kinds)}"
        fix = "" if len(active) == len(ports) else "ports are down: see ibstat; NCCL uses the rest"
        return Check(group="network", name="InfiniBand", status="warn" if fix else "ok", found=found, fix=fix)
    wanted = gpus and nodes > 1
    fix = "gradients will go over TCP; inside a container add --device /dev/infiniband" if wanted else ""
    return Check(group="network", name="InfiniBand", status="warn" if wanted else "ok", found="none", fix=fix)
