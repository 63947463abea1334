"""Other implementations of the same head, run beside ours where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

# distributions whose versions are recorded with the results
DISTRIBUTIONS = ("liger-kernel", "nvidia-cutlass-dsl", "cut-cross-entropy")


@dataclass(frozen=True)
class Peer:
    """`loss`: mean negative log-likelihood from hidden, weight, target; None where the peer cannot run."""

    name: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    reason: str = ""


def peers() -> list[Peer]:
    """Every peer, those that cannot run with the reason."""
    return [
        Peer("torch log_softmax+gather", _log_softmax),
        *(
            _peer(name, load)
            for name, load in (
                ("torch F.linear_cross_entropy", _torch_chunked),
                ("liger FLCE", _liger),
                ("liger SM90 scaled CE", _liger_sm90),
                ("cut-cross-entropy", _cut_cross_entropy),
            )
        ),
    ]


def peer_versions() -> dict[str, str | None]:
    """Installed versions of the peers' distributions, None where there is none."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _peer(name: str, load: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]]) -> Peer:
    try:
        return Peer(name, load())
    except ImportError as error:
        return Peer(name, None, f"not installed: {error}".splitlines()[0])
    except RuntimeError as error:
        return Peer(name, None, f"unsupported: {error}".splitlines()[0])


def _log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return -log_p.gather(1, target[:, None]).mean()


def _torch_chunked():
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()  # without options it holds all logits
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)


def _liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss(weight, hidden, target)


def _liger_sm90():
    """The CuTe DSL kernels themselves: Liger's dispatching front falls back to chunked torch elsewhere. They
    come with `liger-kernel[cutedsl]`, which brings nvidia-cutlass-dsl."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
        LigerFusedScaledCrossEntropySM90Function,
    )

    if torch.cuda.get_device_capability() != (9, 0):
        raise RuntimeError("needs compute capability 9.0")
    # per-token negative log-likelihood and entropy, as ours
    return lambda hidden, weight, target: LigerFusedScaledCrossEntropySM90Function.apply(
        hidden, weight, target, 1.0, -100, 1, True
    )[0].mean()


def _cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy
