"""Slots: memory that the student's process owns, and into which an engine's processes write rows.

What the host holds is a file without a name (``memfd_create``), which others open through the owner's ``/proc``: it is
gone with the last process that maps it, however that ended, and no limit of ``/dev/shm`` applies.
"""

from __future__ import annotations

import base64
import functools
import logging
import math
import mmap
import os
import threading
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from kdflow.contracts import KdflowError
from kdflow.engines.sglang import cuda_runtime

_log = logging.getLogger("kdflow")

_MESSAGE_BYTES = 2000
_PAGE = mmap.PAGESIZE
# What became of the exporter, in its own word.
UNUSED, HOST, CUDA, FAILED = 0, 1, 2, -1


@dataclass(frozen=True)
class Layout:
    """Sizes of all slots.

    Attributes:
        slots: how many there are.
        tokens: rows, and sequences, that one holds at most.
        hidden_size: of a row.
        dtype: of a row, by its name in torch.
    """

    slots: int
    tokens: int
    hidden_size: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The rows' type."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.hidden_size * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Request:
    """One sequence on its way through an engine; its id says where its rows belong.

    Attributes:
        slot: the slot.
        sequence: its number in the slot, where its digest goes.
        first: row of the slot that its first row goes to.
        count: rows that are wanted of it.
        owner: number of the slots' owner among those whom the engine serves.
    """

    slot: int
    sequence: int
    first: int
    count: int
    owner: int = 0

    def rid(self, serial: int) -> str:
        """The request id; ``serial`` keeps ids apart that an engine has at a time."""
        return f"kdflow-{serial}-{self.slot}-{self.sequence}-{self.first}-{self.count}-{self.owner}"

    def follows(self, other: Request) -> bool:
        """Whether its rows and its digest lie right behind those of another one."""
        return (self.slot, self.sequence, self.first) == (other.slot, other.sequence + 1, other.first + other.count)

    @classmethod
    def parse(cls, rid: str) -> Request | None:
        """The request behind an id; None for one that is not kdflow's."""
        head, _, rest = rid.partition("-")
        return cls(*map(int, rest.split("-")[1:])) if head == "kdflow" else None


class TokenIds(NamedTuple):
    """Where the engine's process reads the ids of a sequence: a list of them in a message would be copied four times.

    Attributes:
        path: of a file.
        offset: of the first one, in bytes; each is an int32.
        length: how many there are.
    """

    path: str
    offset: int
    length: int

    def read(self) -> list[int]:
        """The ids as SGLang takes them."""
        read = os.pread(_descriptor(self.path), 4 * self.length, self.offset)
        ids: list[int] = np.frombuffer(read, np.int32).tolist()
        return ids


@functools.cache
def _descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


class HostMemory:
    """What student and engine share in host memory.

    Attributes:
        layout: sizes.
        ids: tokens of all sequences, one behind the other, int32 ``[slots, tokens]`` of numpy; the student writes.
        ids_offset: bytes before them.
        positions: which tokens of each sequence are wanted, int32 ``[slots, tokens]`` of numpy; the student writes.
        indices: the same as tokens of the pass that read them, of torch; the engine writes.
        digests: of the token ids that the engine really read, int64 ``[slots, tokens]`` of numpy; the engine writes.
        rows: ``[slots, tokens, H]`` of torch; untouched, and so no memory, where rows go to CUDA memory.

    What is small is numpy's: its operations take a fraction of torch's, most of all the first ones after a wait.
    """

    def __init__(self, layout: Layout, descriptor: int) -> None:
        self.layout = layout
        count = layout.slots * layout.tokens
        self._control_bytes = math.ceil((16 + _MESSAGE_BYTES + count * 20) / _PAGE) * _PAGE
        size = self._control_bytes + count * layout.row_bytes
        if os.fstat(descriptor).st_size == 0:
            os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, size)
        self._page_locked = False
        shape = (layout.slots, layout.tokens)
        self._state = np.frombuffer(self._map, np.int64, 2)
        self.digests = np.frombuffer(self._map, np.int64, count, 16).reshape(shape)
        self.positions = np.frombuffer(self._map, np.int32, count, 16 + 8 * count).reshape(shape)
        self.indices = torch.frombuffer(self._map, dtype=torch.int32, offset=16 + 12 * count, count=count).view(shape)
        self.ids_offset = 16 + 16 * count
        self.ids = np.frombuffer(self._map, np.int32, count, self.ids_offset).reshape(shape)
        self._message = 16 + 20 * count
        self.rows = torch.frombuffer(
            self._map, dtype=layout.torch_dtype, offset=self._control_bytes, count=count * layout.hidden_size
        ).view(*shape, layout.hidden_size)

    @classmethod
    def open(cls, layout: Layout, path: str) -> HostMemory:
        """In another process than the owner's."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(layout, descriptor)
        finally:
            os.close(descriptor)

    @property
    def state(self) -> int:
        """One of UNUSED, HOST, CUDA and FAILED."""
        return int(self._state[0])

    @state.setter
    def state(self, value: int) -> None:
        self._state[0] = value

    @property
    def passes(self) -> int:
        """How often the exporter has seen requests."""
        return int(self._state[1])

    def count_pass(self) -> None:
        """Count one."""
        self._state[1] += 1

    @property
    def message(self) -> str:
        """What went wrong in the engine's process: why CUDA memory could not be used, or why it failed."""
        return self._map[self._message : self._message + _MESSAGE_BYTES].rstrip(b"\0").decode(errors="replace")

    @message.setter
    def message(self, text: str) -> None:
        encoded = text.encode()[:_MESSAGE_BYTES]
        self._map[self._message : self._message + _MESSAGE_BYTES] = encoded.ljust(_MESSAGE_BYTES, b"\0")

    def page_lock(self, with_rows: bool) -> None:
        """Let CUDA copy to and from it asynchronously."""
        size = len(self._map) if with_rows else self._control_bytes
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostRegister(self._state.ctypes.data, size, 0)
        torch.cuda.check_error(int(error))
        self._page_locked = True

    def close(self) -> None:
        """Undo :meth:`page_lock`: CUDA would hold the memory for as long as the process lives."""
        if self._page_locked:
            torch.cuda.cudart().cudaHostUnregister(self._state.ctypes.data)  # type: ignore[no-untyped-call]
            self._page_locked = False


class Slots:
    """The slots as the student sees them: each is free or leased, and nothing writes into one that is leased.

    Attributes:
        layout: sizes.
        host: what is shared in host memory.
        rows: ``[slots, tokens, H]``, on the host or, if the engine can open it, in CUDA memory of the student's device.
        config: what an exporter opens them by: plain data.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self._device = layout, device
        self._descriptor = os.memfd_create("kdflow-slots")
        self.host = HostMemory(layout, self._descriptor)
        self._cuda: cuda_runtime.Allocation | None = None
        if device.type == "cuda":
            self._cuda = cuda_runtime.allocate(layout.slots * layout.tokens * layout.row_bytes, device)
        self.rows = self.host.rows
        self._free = list(range(layout.slots))
        self._read: dict[int, torch.cuda.Event] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._settled = UNUSED
        self._path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.config = {
            "layout": asdict(layout),
            "path": self._path,
            "page_lock": device.type == "cuda",
            "cuda": None if self._cuda is None else {
                "device": device.index, "handle": base64.b64encode(self._cuda.handle).decode(),
            },
        }  # fmt: skip

    def ids(self, slot: int, first: int, length: int) -> TokenIds:
        """Those of a slot from the ``first`` on, as the engine's process finds them."""
        return TokenIds(self._path, self.host.ids_offset + 4 * (slot * self.layout.tokens + first), length)

    def settle(self) -> None:
        """Use the transport that the exporter has found to work, and drop the other."""
        if self._settled:
            if self.host.state != self._settled:
                raise KdflowError("after a restart the engine can no longer write into the student's CUDA memory")
            return
        self._settled = self.host.state
        if self._cuda is not None and self._settled == CUDA:
            self.rows = self._cuda.tensor(self.layout.torch_dtype).view(self.rows.shape)
        elif self._cuda is not None:
            _log.warning(
                f"the teacher's rows cannot go through CUDA memory, and go through the host: {self.host.message}"
            )
            self._free_cuda()
            self.config["cuda"] = None
            self.host.page_lock(with_rows=True)

    def _free_cuda(self) -> None:
        if self._cuda is not None:
            self._cuda.free()
            self._cuda = None

    def acquire(self, timeout: float) -> int:
        """A slot that nobody reads any more; waits until there is one.

        Raises:
            KdflowError: none was released in ``timeout`` seconds, or they are closed.
        """
        with self._changed:
            found = self._changed.wait_for(lambda: self._free or self._closed, timeout)
            if self._closed:
                raise KdflowError("the slots of the teacher's rows are closed")
            if not found:
                raise KdflowError(
                    f"all {self.layout.slots} slots of the teacher's rows were in use for {timeout:g} s: release a "
                    "lease before the next micro-batch is scored"
                )
            slot = self._free.pop(0)
        if (event := self._read.pop(slot, None)) is not None:
            event.synchronize()  # kernels of the student that read the rows may still be queued
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back; what is queued on the current stream may still read it."""
        if self._device.type == "cuda":
            self._read[slot] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._read[slot].record()
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Free the memory as soon as nothing maps it; whoever waits for a slot, in another thread, is told."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._free_cuda()
        self.host.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def place_factors(tokens: int) -> np.ndarray:
    """A pseudo-random 64-bit factor for each place in a sequence (the mix of SplitMix64)."""
    mixed = np.arange(1, tokens + 1) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return mixed ^ (mixed >> 31)


def digest(ids: np.ndarray, by_place: np.ndarray) -> np.int64:
    """Of the token ids ``[t]`` of a sequence: their weighted sum modulo 2^64.

    Another id, another place or another number of tokens give another sum, but for one case in 2^64.
    """
    found: np.int64 = (ids + 1) @ by_place[: len(ids)]
    return found
