"""Shards of target rows, in safetensors files that tell themselves which sequences they hold.

A shard is written aside, flushed to disk and renamed: it is there whole or not at all, whenever the writer dies. Its
tensors, for m sequences with n targets in all:

    keys     uint8 [m, 16]   what the rows of a sequence are found by, see :func:`sequence_key`
    bounds   int64 [m + 1]   where the rows of each sequence begin and end
    targets  int32 [n]       predicting positions in the sequence, ascending
    rows     [n, H]          hidden states there, in the teacher's dtype
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kdflow.contracts import KdflowError
from kdflow.files import replacing

_NAME = "rows-{:05d}.safetensors"
_PATTERN = "rows-*.safetensors"


def sequence_key(ids: np.ndarray) -> bytes:
    """What the rows of a sequence are found by: 16 bytes of the SHA-256 of its token ids ``[t]``."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).digest()[:16]


@dataclass(frozen=True)
class SequenceRows:
    """What is stored of one sequence.

    Attributes:
        key: see :func:`sequence_key`.
        targets: predicting positions, int32 ``[n]``, ascending.
        rows: hidden states there, ``[n, H]``.
    """

    key: bytes
    targets: Tensor
    rows: Tensor


class Shards:
    """All shards of a capture, mapped into memory: only what is asked for is read from disk.

    Raises:
        KdflowError: a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}  # number of the file, first row, row behind the last
        for file in sorted(folder.glob(_PATTERN)):
            self._open(file)

    def targets(self, key: bytes) -> np.ndarray:
        """The positions ``[n]`` of a sequence whose rows are stored; none of one that is not there."""
        stored: np.ndarray = self._slice(key, "targets").numpy() if key in self._places else np.empty(0, np.int32)
        return stored

    def holds(self, key: bytes, targets: np.ndarray) -> bool:
        """Whether the rows of a sequence at ``targets [n]`` are stored."""
        return self._found(key, targets) is not None

    def rows(self, key: bytes, targets: np.ndarray) -> Tensor | None:
        """The rows of a sequence at ``targets [n]``, ascending, ``[n, H]``; None where they are not stored."""
        found = self._found(key, targets)
        if found is None:
            return None
        stored: Tensor = self._slice(key, "rows")
        return stored if len(found) == len(stored) else stored[torch.from_numpy(found)]

    def _found(self, key: bytes, targets: np.ndarray) -> np.ndarray | None:
        """Which of a sequence's rows belong to ``targets``."""
        stored = self.targets(key)
        places = np.searchsorted(stored, targets)
        found = bool((places < len(stored)).all()) and np.array_equal(stored[places], targets)
        return places if found else None

    def _slice(self, key: bytes, name: str) -> Any:
        number, start, stop = self._places[key]
        return self._files[number].get_slice(name)[start:stop]

    def append(self, sequences: Sequence[SequenceRows]) -> None:
        """Write a further shard. What it holds replaces what was stored of the same sequences."""
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(one.key for one in sequences)), dtype=torch.uint8).view(-1, 16),
            "bounds": torch.tensor([0, *(len(one.targets) for one in sequences)]).cumsum(0),
            "targets": torch.cat([one.targets for one in sequences]),
            "rows": torch.cat([one.rows for one in sequences]),
        }
        last = max(self._folder.glob(_PATTERN), default=None)
        file = self._folder / _NAME.format(0 if last is None else int(last.stem.removeprefix("rows-")) + 1)
        save_whole(file, tensors)
        self._open(file)

    def _open(self, file: Path) -> None:
        opened = open_tensors(file)
        keys, bounds = opened.get_tensor("keys").numpy(), opened.get_tensor("bounds").tolist()
        for key, start, stop in zip(keys, bounds[:-1], bounds[1:], strict=True):
            self._places[key.tobytes()] = (len(self._files), start, stop)
        self._files.append(opened)


def open_tensors(file: Path) -> Any:
    """A safetensors file, mapped into memory.

    Raises:
        KdflowError: it is damaged.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise KdflowError(
            f"{file} cannot be read ({error}): delete it, and let kdflow cache RUN.YAML write again what it held"
        ) from None


def save_whole(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file so that it is there whole or not at all.

    Raises:
        KdflowError: it cannot be written.
    """
    try:
        with replacing(file) as stream:
            stream.write(save(dict(tensors), dict(metadata or {})))
    except OSError as error:
        raise KdflowError(
            f"{file} cannot be written: {error.strerror}; mend it, and the same command goes on where it stopped"
        ) from None
