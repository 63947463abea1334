"""Process groups and devices. Importing this package readies Megatron-Core for the machine."""

from megavar.parallel import adam, cpu

cpu.install()
adam.install()
