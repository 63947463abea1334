"""Launching on the device that holds the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def on_device_of_first(function: Callable) -> Callable:
    """Run `function` with its first argument's device as the current one: Triton launches on the current."""

    @functools.wraps(function)
    def on_device(first: Tensor, *arguments):
        with torch.cuda.device_of(first):
            return function(first, *arguments)

    return on_device
