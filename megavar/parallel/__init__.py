"""Process groups and devices. Importing this package readies Megatron-Core for the machine; import it before `megatron`."""

from megavar.parallel import cpu

cpu.install()
