"""Counting the memory that tensors take, storage by storage, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of all storages that operations inside have touched and that are still held; ``peak``: the most so far.

    FSDP empties storages that it keeps, so that sizes are asked for each time: for small models alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            for tensor in _plain(leaf):
                storage = tensor.untyped_storage()
                if storage.device.type != "meta":  # which are sizes alone
                    self._storages[storage._cdata] = storage
        self.peak = max(self.peak, self.bytes)
        return out

    @property
    def bytes(self) -> int:
        """As of now."""
        return sum(storage.nbytes() for storage in list(self._storages.values()))


def _plain(value: Any) -> Iterator[Tensor]:
    """The tensors that a value is made of: a sharded or a quantized tensor has others inside."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
