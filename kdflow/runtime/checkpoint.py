"""Checkpoints: written asynchronously by torch.distributed.checkpoint, whole or not at all, and verified when read.

A checkpoint is written aside, flushed to disk, given a manifest of hashes, and only then renamed; ``latest`` follows.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from kdflow.contracts import KdflowError
from kdflow.files import sha256, sync
from kdflow.runtime.processes import Processes, lost_a_peer
from kdflow.runtime.run_directory import step_directories

_log = logging.getLogger("kdflow")

MANIFEST = "manifest.json"
RUN_STATE = "run_state.json"


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int, processes: Processes) -> None:
        self.directory, self._keep, self._processes = directory, keep, processes
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if processes.is_first:
            for leftover in step_directories(directory, ".step-"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: Mapping[str, Tensor], run_state: Mapping[str, Any]) -> None:
        """Copy ``tensors`` aside and return; a thread writes them. Waits for the save before, if it still runs."""
        self.wait()
        staged = self._stage(tensors)
        self._thread = threading.Thread(target=self._write, args=(step, staged, dict(run_state)), name="checkpoint")
        self._thread.start()

    def _stage(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, page-locked beside a GPU; the buffers serve again for the next save."""
        cuda = self._processes.device.type == "cuda"
        staged: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if name not in self._buffers:
                self._buffers[name] = torch.empty_like(local, device="cpu", pin_memory=cuda)
            staged[name] = self._buffers[name].copy_(local, non_blocking=cuda)
            if isinstance(tensor, DTensor):
                staged[name] = DTensor.from_local(
                    staged[name], self._processes.host_mesh, tensor.placements, run_check=False,
                    shape=tensor.shape, stride=tensor.stride(),
                )  # fmt: skip
        if cuda:
            torch.cuda.current_stream().synchronize()
        return staged

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            KdflowError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            free = shutil.disk_usage(self.directory).free / 2**30
            raise KdflowError(
                f"{self.directory}: the checkpoint could not be written, where {free:.1f} GiB are free: {_first(error)}"
            ) from error

    def _write(self, step: int, staged: Any, run_state: dict[str, Any]) -> None:
        name = f"step-{step:08d}"
        aside = self.directory / f".{name}"
        try:
            writer = FileSystemWriter(aside, sync_files=True)
            save(staged, storage_writer=writer, process_group=self._processes.background)
            if self._processes.is_first:
                (aside / RUN_STATE).write_text(json.dumps(run_state), encoding="utf-8")
                write_manifest(aside)
                final = self.directory / name
                if final.exists():  # a damaged one, which the run fell back from
                    shutil.rmtree(final)
                aside.rename(final)
                sync(self.directory)
                _point(self.directory / "latest", name)
                _log.info(f"{final} is written")
                # A later one is damaged, or was left behind when the run went on from an earlier one.
                there = step_directories(self.directory)
                end = there.index(final) + 1
                for old in (*there[: max(0, end - self._keep)], *there[end:]):
                    shutil.rmtree(old)
        except BaseException as error:  # raised again by wait()
            self._error = error
            if self._processes.is_first:  # what was written of it may be all that the disk had room for
                shutil.rmtree(aside, ignore_errors=True)

    def load(
        self, tensors: Callable[[Mapping[str, Any]], dict[str, Tensor]]
    ) -> tuple[Mapping[str, Any] | None, list[str]]:
        """Load the newest whole checkpoint into tensors.

        Args:
            tensors: gives the tensors to write into, from the run state of the checkpoint.

        Returns:
            The run state, or None where there is no checkpoint, and warnings about damaged ones.
        """
        found, warnings = self._processes.broadcast(newest(self.directory) if self._processes.is_first else None)
        if found is None and warnings:
            raise KdflowError(
                "\n".join([*warnings, f"no checkpoint in {self.directory} is whole: to start afresh, delete them"])
            )
        if found is None:
            return None, warnings
        whole = self._processes.is_first
        run_state = self._processes.broadcast(json.loads((found / RUN_STATE).read_text("utf-8")) if whole else None)
        load_tensors(found, tensors(run_state), process_group=self._processes.control)
        return run_state, warnings


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a warning for each newer one that is not."""
    warnings: list[str] = []
    oldest_first = step_directories(directory)
    while oldest_first:
        path = oldest_first.pop()
        damage = verify(path)
        if damage is None:
            return path, warnings
        then = "falling back to the one before" if oldest_first else "there is none before it"
        warnings.append(f"checkpoint {path} is damaged ({damage}); {then}")
    return None, warnings


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if sha256(path / name) != expected:
                return f"{name} has changed"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def load_tensors(path: Path, tensors: dict[str, Tensor], process_group: Any = None) -> None:
    """Read tensors of a checkpoint in place; tensors it does not hold are an error.

    Raises:
        KdflowError: the checkpoint holds other tensors, is not what kdflow wrote, or was deleted meanwhile.
    """
    reader = _Reader(path)
    try:
        reader.read_metadata()  # what it raises reaches us as it is; DCP 2.13 logs it and makes another error of it
        with catch_warnings():
            filterwarnings("ignore", "torch.distributed is disabled")  # one process reads alone, as is meant
            load(tensors, storage_reader=reader, process_group=process_group, no_dist=process_group is None)
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        met = _first(error)
        if lost_a_peer(met):
            raise
        if isinstance(met, FileNotFoundError):
            raise KdflowError(
                f"{path} was deleted while it was read, as a run does that has training.keep_checkpoints newer ones: "
                "try again"
            ) from None
        if isinstance(met, OSError):
            raise KdflowError(f"{path} cannot be read: {met}") from None
        raise KdflowError(
            f"{path} does not fit the student of this run: {met}. Give student.model, algorithm, "
            "teacher.follow and training.optimizer back as they were, or give another output"
        ) from None


def _first(error: BaseException) -> BaseException:
    """What one rank met, where DCP tells it of all, each with the place in its code; it says something."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error if str(error) else RuntimeError(type(error).__name__)


class _Reader(FileSystemReader):
    """Reads metadata with an unpickler that knows DCP's own classes and nothing else, and accepts tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        raw = (Path(self.path) / ".metadata").read_bytes()
        try:
            metadata = _Unpickler(io.BytesIO(raw)).load()
        except Exception as error:  # what is no pickle makes it raise what it likes
            raise KdflowError(
                f"{self.path}/.metadata is not what kdflow wrote: {_first(error)}; do not use this checkpoint"
            ) from None
        if not isinstance(metadata, Metadata):
            raise KdflowError(f"{self.path}: .metadata holds something else than a checkpoint's metadata")
        if others := [
            name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)
        ]:
            raise KdflowError(f"{self.path}: {others[0]} is no tensor; kdflow's checkpoints hold tensors only")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset({
        ("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
        ("collections", "OrderedDict"), ("torch._utils", "_get_layout"),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module in self._MODULES and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type):
                return found
        elif (module, name) in self._NAMES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's metadata may not name {module}.{name}")


def write_manifest(path: Path) -> None:
    """Hash every file of a checkpoint, and flush what is written here to disk."""
    manifest = {str(file.relative_to(path)): sha256(file) for file in _files(path)}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in (path / RUN_STATE, path / MANIFEST, path):
        sync(file)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.rglob("*")) if file.is_file())


def _point(link: Path, name: str) -> None:
    aside = link.with_name(".latest")
    aside.unlink(missing_ok=True)
    aside.symlink_to(name)
    aside.replace(link)
    sync(link.parent)
