"""Make PyPI's torchvision importable on a CPU build of torch.

SGLang imports torchvision whatever the model. The binary on PyPI is linked against CUDA, so on a CPU torch
its operators stay unloaded and the import fails when it registers their meta kernels. Declared first, those
schemas are enough: no text model ever calls the operators.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

_SCHEMAS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []  # a schema lives as long as its library


def declare() -> None:
    """Declare the operators unless this torchvision brings them. Idempotent."""
    try:
        own_operators = torch.version.cuda is not None or "+cpu" in version("torchvision")
    except PackageNotFoundError:
        return
    if own_operators or _libraries:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in _SCHEMAS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
