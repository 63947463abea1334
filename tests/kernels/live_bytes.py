"""Peak of live tensor memory, counted at every operator."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`peak`: most bytes of storage, made while the mode was on, that were alive at once."""

    def __init__(self):
        super().__init__()
        self.peak = self._live = 0
        self._seen = weakref.WeakSet()

    def ignore(self, *tensors):
        """Do not count these tensors' storage."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())
        return self

    def _freed(self, size):
        self._live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self._seen:
                storage = leaf.untyped_storage()
                self._seen.add(storage)
                size = storage.nbytes()
                self._live += size
                weakref.finalize(storage, self._freed, size)
        self.peak = max(self.peak, self._live)
        return result
