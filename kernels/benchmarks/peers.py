"""Other implementations of the same head, run beside ours where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor


def peers() -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """(name, mean negative log-likelihood from hidden, weight, target) of every peer at hand."""
    yield "torch log_softmax+gather", _log_softmax
    if hasattr(F, "linear_cross_entropy"):
        yield "torch F.linear_cross_entropy", F.linear_cross_entropy
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        yield "liger fused linear CE", lambda hidden, weight, target: liger(weight, hidden, target)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        yield "cut-cross-entropy", linear_cross_entropy
    except ImportError:
        pass


def _log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_p = (hidden @ weight.t()).float().log_softmax(-1)
    return -log_p.gather(1, target[:, None]).mean()
