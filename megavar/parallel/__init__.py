"""Process groups and devices. Importing this package readies Megatron-Core for the machine."""

from megavar.parallel import cpu

cpu.install()
