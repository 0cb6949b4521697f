"""A few functions of the CUDA runtime that torch has loaded: what two processes on one GPU need to know and to share.

Memory that another process can write into comes straight from it, beside torch's allocator. Expandable segments and
torch_memory_saver both replace what that stands on, and neither gets along with CUDA IPC; torch's own sharing leaves
files in ``/dev/shm`` when it is killed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
_MPS_ENABLED = 133  # cudaDevAttrMpsEnabled


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class Allocation:
    """``size`` bytes at ``pointer`` of a CUDA device, and what another process opens them by."""

    def __init__(self, pointer: int, size: int, device: torch.device, handle: bytes) -> None:
        self._pointer, self._size, self._device, self.handle = pointer, size, device, handle

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._pointer, False), "version": 3}

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """The memory as one row of numbers; no copy."""
        return torch.as_tensor(self, device=self._device).view(dtype)

    def free(self) -> None:
        """Give it back; no tensor over it may be used any more."""
        with torch.cuda.device(self._device):
            _call("cudaFree", ctypes.c_void_p(self._pointer))

    def close(self) -> None:
        """Give back what was opened, which stays its owner's; no tensor over it may be used any more."""
        with torch.cuda.device(self._device):
            _call("cudaIpcCloseMemHandle", ctypes.c_void_p(self._pointer))


def allocate(size: int, device: torch.device) -> Allocation:
    """Memory of this process, and its handle."""
    pointer, handle = ctypes.c_void_p(), _Handle()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # a context first
        _call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        _call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
    assert pointer.value is not None
    return Allocation(pointer.value, size, device, bytes(memoryview(handle)))


def opened(handle: bytes, size: int, device: torch.device) -> Allocation:
    """Memory of another process.

    Raises:
        RuntimeError: the devices cannot reach each other, or the processes may not share memory.
    """
    pointer, with_peers = ctypes.c_void_p(), ctypes.c_uint(1)
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        _call("cudaIpcOpenMemHandle", ctypes.byref(pointer), _Handle.from_buffer_copy(handle), with_peers)
    assert pointer.value is not None
    return Allocation(pointer.value, size, device, handle)


def mixes_kernels(device: torch.device) -> bool:
    """Whether kernels of several processes run on the device at a time: under CUDA's multi-process service."""
    enabled = ctypes.c_int()
    try:
        _call("cudaDeviceGetAttribute", ctypes.byref(enabled), ctypes.c_int(_MPS_ENABLED), ctypes.c_int(device.index))
    except RuntimeError:  # one that does not know the question
        return False
    return enabled.value == 1


def _call(name: str, *arguments: Any) -> None:
    runtime = _runtime()
    status = getattr(runtime, name)(*arguments)
    if status != 0:
        runtime.cudaGetLastError()  # else the next kernel would report it
        raise RuntimeError(f"{name}: {runtime.cudaGetErrorString(status).decode()}")


@cache
def _runtime() -> Any:
    major = str(torch.version.cuda).partition(".")[0]
    runtime = ctypes.CDLL(f"libcudart.so.{major}")
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime
