"""The only file that adapts Megatron-Core to a machine without CUDA. A no-op where CUDA is there.

Megatron-Core asks torch.cuda for devices, random states, streams and memory figures, and writes
`device="cuda"` in places. Here "the CUDA device" becomes the CPU. Patched are torch.cuda's own names, which
nothing else consults when CUDA is absent, and names inside megatron modules; never torch's tensor
factories, because transformers builds wrong rotary frequencies when those are wrapped.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import types
import warnings
from typing import Any

import torch

from megavar.parallel.gloo import (
    all_gather_in_place,
    gather_uneven,
    reduce_scatter_in_place,
    scatter_sum_uneven,
)

_CPU = torch.device("cpu")

PROXIED_MODULES = (
    "utils",
    "distributed.param_and_grad_buffer",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "models.common.embeddings.rope_utils",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "optimizer.optimizer",
    "pipeline_parallel.schedules",
    "pipeline_parallel.utils",
    "resharding.copy_services.gloo_copy_service",
    "rerun_state_machine",
    "tensor_parallel.data",
    "transformer.moe.moe_layer",
    "transformer.moe.token_dispatcher",
    "transformer.utils",
)
"""Modules of megatron.core that write `device="cuda"`; each sees a torch of its own (`_CpuTorch`)."""

_FACTORIES = frozenset(
    "arange empty empty_like full full_like ones ones_like rand rand_like randint randn randn_like tensor zeros "
    "zeros_like".split()
)

_installed = False


def install() -> None:
    """Adapt torch.cuda and megatron.core; idempotent."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    # Inductor has nothing to gain on these small graphs and needs a compiler.
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    # First, because torch._dynamo, which megatron imports, tabulates torch.cuda's functions by identity.
    with warnings.catch_warnings():
        # Each optional GPU package that is absent is announced; here that is the point.
        warnings.simplefilter("ignore")
        import megatron.core  # noqa: F401
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401

    for name, value in cuda_stand_ins().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = _no_op(), _no_op()
    for owner, name, value in tensor_stand_ins():
        setattr(owner, name, value)
    _patch_megatron()


class _Stream:
    """Work on a CPU is done when the call returns: nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _no_op() -> Any:
    """A function of its own each time: torch._dynamo looks torch.cuda's functions up by identity."""
    return lambda *_, **__: None


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def cuda_stand_ins() -> dict[str, Any]:
    """Names of torch.cuda that megatron.core calls, and what each is on a CPU."""
    stream = _Stream()
    return {
        "current_device": lambda: _CPU,
        "set_device": _no_op(),
        "device_count": lambda: 1,
        "get_device_capability": lambda *_: (0, 0),
        "synchronize": _no_op(),
        "empty_cache": _no_op(),
        "current_stream": lambda *_, **__: stream,
        "default_stream": lambda *_, **__: stream,
        "stream": lambda *_, **__: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "memory_allocated": lambda *_, **__: 0,
        "max_memory_allocated": lambda *_, **__: 0,
        "memory_reserved": lambda *_, **__: 0,
        "max_memory_reserved": lambda *_, **__: 0,
        "manual_seed": lambda seed: _seed_cpu(seed),
        "manual_seed_all": lambda seed: _seed_cpu(seed),
        "get_rng_state": lambda *_, **__: torch.random.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.random.set_rng_state(state),
    }


def tensor_stand_ins() -> list[tuple[type, str, Any]]:
    """Methods of tensors and modules that megatron.core calls, and what each is on a CPU."""
    return [
        (torch.Tensor, "cuda", _itself),
        (torch.nn.Module, "cuda", _itself),
        (torch.Tensor, "pin_memory", _itself),
        (torch.Tensor, "type", _type_in_cuda_names),
    ]


def _seed_cpu(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)


_tensor_type = torch.Tensor.type


def _type_in_cuda_names(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The distributed optimizer and gradient clipping compare `type()` with "torch.cuda.FloatTensor"."""
    answer = _tensor_type(self, *args, **kwargs)
    if isinstance(answer, str) and ".cuda." not in answer:
        return answer.replace("torch.", "torch.cuda.", 1)
    return answer


class _CpuTorch(types.ModuleType):
    """`torch` as one megatron module sees it: factories asked for "cuda" or pinned memory answer on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch, name)
        if name not in _FACTORIES:
            return real

        def factory(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return real(*args, **kwargs)

        setattr(self, name, factory)
        return factory


def _patch_megatron() -> None:
    cpu_torch = _CpuTorch()
    for name in PROXIED_MODULES:
        module = importlib.import_module(f"megatron.core.{name}")
        if getattr(module, "torch", None) is not torch:
            raise ImportError(
                f"megatron.core.{name} no longer imports torch: revise {__name__}.PROXIED_MODULES"
            )
        module.torch = cpu_torch  # type: ignore[attr-defined]

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.random.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.random.set_rng_state(state)

    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Split sizes are handed to all_to_all as numpy; upstream converts only tensors that live on a GPU.
    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_cpu

    _patch_uneven_collectives()
    _patch_packed_rotary()

    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import clip_grads

    # Gradients and parameters lie in one buffer a bucket; a rank's share is a view of it.
    param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter_in_place
    param_and_grad_buffer.dist_all_gather_func = all_gather_in_place
    clip_grads.multi_tensor_scale_impl = _scale_in_place


def _patch_uneven_collectives() -> None:
    """Tensor parallelism inside experts gathers as many tokens from each rank as were routed to it."""
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gathered(input_: Any, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *args, **kwargs)
        return gather_uneven(input_, output_split_sizes, group)

    def summed(input_: Any, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, *args, **kwargs)
        return scatter_sum_uneven(input_, input_split_sizes, group)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gathered, summed


def _scale_in_place(
    _chunk_size: int, _overflow: Any, tensors: list[list[torch.Tensor]], scale: float
) -> None:
    """amp_C.multi_tensor_scale of gradients onto themselves; upstream's stand-in scales a copy and copies it back."""
    assert all(source is target for source, target in zip(*tensors, strict=True))
    torch._foreach_mul_(tensors[1], scale)


def _patch_packed_rotary() -> None:
    """Packed sequences are rotated in one pass; upstream's path without a fused kernel takes them one at a time."""
    from megatron.core.models.common.embeddings import rope_utils

    one_by_one = rope_utils._apply_rotary_pos_emb_thd

    def rotated(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        cp_group = kwargs.pop("cp_group")
        # With a row of frequencies for every packed token upstream needs no loop.
        if cp_group.size() > 1 or args or freqs.shape[0] == t.shape[0]:
            return one_by_one(t, cu_seqlens, freqs, *args, cp_group=cp_group, **kwargs)
        starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=t.shape[0])
        places = torch.arange(t.shape[0]) - starts
        whole = rope_utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[places], **kwargs)
        return whole.squeeze(1)

    rope_utils._apply_rotary_pos_emb_thd = rotated
