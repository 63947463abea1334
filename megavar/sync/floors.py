"""What a plan costs: bytes at both ends of every link, and the least time that they can take. Torch-free.

Times are of a model of the hardware, not measured: every GPU sends and receives through a port of its own, all at
once and at its full rate, with nothing else in the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megavar.sync.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """The port of one GPU."""

    name: str
    bytes_per_s: float
    """In each direction."""


NVLINK = Interconnect(name="NVLink", bytes_per_s=450e9)
"""H100: 900 GB/s, both directions together (NVIDIA's H100 data sheet)."""
INFINIBAND = Interconnect(name="400G InfiniBand", bytes_per_s=48e9)
"""One NIC per GPU: 400 Gbit/s are 50 GB/s, of which large messages carry about 48."""
INTERCONNECTS = (NVLINK, INFINIBAND)
HBM_BYTES_PER_S = 3.35e12
"""H100 SXM, reads and writes together (NVIDIA's H100 data sheet)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes on the wire of one synchronisation, in the engine's types."""

    receivers: tuple[int, ...]
    """Per GPU of an engine; the same in every engine. Their sum is an engine's model, its own copies included."""
    senders: tuple[int, ...]
    """Per rank of the trainer, all engines together."""
    links: dict[tuple[int, int, int], int]
    """(sender, engine, rank of the engine) -> bytes, of all pairs that talk."""
    model: int
    """One copy of every weight: what a gather puts in one place and a broadcast sends to everyone."""

    def receiver_floor(self, through: Interconnect) -> float:
        """Seconds: no plan can be faster, each GPU of an engine needs its shard."""
        return max(self.receivers) / through.bytes_per_s

    def sender_floor(self, through: Interconnect) -> float:
        """Seconds: all that the engines need, from all ranks of the trainer alike."""
        return sum(self.senders) / len(self.senders) / through.bytes_per_s

    def expected(self, through: Interconnect) -> float:
        """Seconds of this plan: its busiest end, and packing there and unpacking at the other, one after another.

        Packing reads and writes every byte once, and so does unpacking.
        """
        copies = 2 * (max(self.senders) + max(self.receivers)) / HBM_BYTES_PER_S
        return max(*self.senders, *self.receivers) / through.bytes_per_s + copies

    def broadcast_floor(self, through: Interconnect) -> float:
        """Seconds of a gather and a broadcast, for comparison: the whole model through one port."""
        return self.model / through.bytes_per_s


def traffic(plan: Plan) -> Traffic:
    """Exact counts."""
    senders, receivers = [0] * plan.trainer.ranks, [0] * plan.engine.tp
    for (sender, receiver), size in plan.links.items():
        senders[sender] += size
        if receiver.engine == 0:
            receivers[receiver.rank] += size
    whole = 0
    for tensor in plan.table.tensors:
        if not tensor.tied_copy:
            elements = sum(math.prod(source.shape) for source in tensor.sources)
            whole += plan.engine.wire_bytes(tensor, elements)
    links = {(sender, *receiver): size for (sender, receiver), size in plan.links.items()}
    return Traffic(receivers=tuple(receivers), senders=tuple(senders), links=links, model=whole)
