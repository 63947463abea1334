"""The platform: any CPU, PyTorch operators only.

SGLang's own CPU engine needs AMX and the `sgl_kernel` CPU wheel; dispatching to the "native" key takes the
reference implementation of every operator instead.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class NativeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def apply_server_args_defaults(self, server_args: object) -> None:
        """Nothing: the launcher passes every flag this platform needs."""
