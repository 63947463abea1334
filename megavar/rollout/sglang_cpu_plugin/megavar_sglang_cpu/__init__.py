"""Entry points that let SGLang 0.5 run on a machine without a GPU; on one with a GPU they do nothing."""

from __future__ import annotations

ATTENTION_BACKEND = "torch_native"


def activate() -> str | None:
    """Name of the platform class, or None where CUDA is there and SGLang's own platform serves.

    SGLang resolves its platform in every process before it imports torchvision, hence the call here.
    """
    import torch

    if torch.cuda.is_available():
        return None
    from megavar_sglang_cpu.torchvision_schema import declare

    declare()
    return "megavar_sglang_cpu.platform:NativeCpuPlatform"


def install_hooks() -> None:
    """Replace the calls of the server that assume CUDA or `sgl_kernel` on the paths megavar uses."""
    import torch

    if torch.cuda.is_available():
        return
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megavar_sglang_cpu.seeded_sampling import multinomial_with_seed

    # Per-request seeds are honoured under --enable-deterministic-inference only. PyTorch's own matrix
    # products stay: they depend on the batch by rounding, the seeds do not depend on it at all.
    choices.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    choices.add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])
    replacements = {
        "sglang.srt.layers.sampler.multinomial_with_seed": multinomial_with_seed,
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode": _nothing,
        # The host cache pins its buffer with cudaHostRegister; host memory is all there is here.
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register": _nothing,
    }
    for target, replacement in replacements.items():
        HookRegistry.register(target, replacement, HookType.REPLACE)


def _nothing(*args: object, **kwargs: object) -> None:
    return None
