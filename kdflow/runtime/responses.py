"""A file of responses that is written so that a kill at any moment neither loses a line nor doubles one.

Lines are flushed to disk before the file beside it says that they are there; what that file does not tell of is cut off
when it is opened again, and written anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from kdflow.contracts import KdflowError
from kdflow.runtime.run_directory import changes, write_atomically


@dataclass
class Progress:
    """What has been written so far, runs before a kill included.

    Attributes:
        prompts: prompts that have been answered.
        responses: responses that were generated.
        kept: those that were written.
        truncated: responses that ended at ``max_new_tokens``.
        empty: responses without text, which nothing can be learnt from: never written.
        unsolved: prompts of which no response was verified.
        tokens: tokens that were generated.
        seconds: that this took, without loading.
        size: bytes of the output.
    """

    prompts: int = 0
    responses: int = 0
    kept: int = 0
    truncated: int = 0
    empty: int = 0
    unsolved: int = 0
    tokens: int = 0
    seconds: float = 0.0
    size: int = 0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def require_regular(path: Path) -> None:
    """Refuse what is there and cannot be a file of responses, which is cut, locked and has a file beside it.

    Raises:
        KdflowError: it is a directory, a device, a pipe, or another name of what a process has open.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # it is not there yet; what else may be wrong, opening it tells
    if stat.S_ISDIR(mode):
        raise KdflowError(f"{path} is a directory; give a file as the output, such as {path / 'responses.jsonl'}")
    folder = path.parent.resolve()
    # /dev/stdout is a regular file where the shell sends it into one, but nothing can stand beside it.
    if not stat.S_ISREG(mode) or folder == Path("/dev") or folder.is_relative_to("/proc"):
        raise KdflowError(f"{path} is no regular file, with which a run could go on after a kill; give another output")


class Responses:
    """The file of responses, and the file beside it that says with which settings and how far it was written.

    Args:
        path: the file.
        settings: what the responses depend on.
        prompts: how many prompts are to be answered in all.

    Raises:
        KdflowError: on entry, the file holds something else, was begun with other settings, was changed, is in use or
            cannot be written to.
    """

    _file: IO[bytes]

    def __init__(self, path: Path, settings: Mapping[str, Any], prompts: int) -> None:
        self.path, self._settings, self._prompts = path, settings, prompts
        self._beside = path.with_name(f"{path.name}.progress.json")
        self.progress = Progress()

    def __enter__(self) -> Responses:
        require_regular(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                self._file = stack.enter_context(self.path.open("ab"))
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fresh = not self._beside.exists()
                if fresh and self.path.stat().st_size > 0:
                    raise KdflowError(
                        f"{self.path} exists, and there is no {self._beside.name} beside it: kdflow generate did not "
                        "write it. Give another output, or delete it"
                    )
                if fresh:
                    self._tell()
                else:
                    self._restore()
                stack.pop_all()
        except BlockingIOError:
            raise KdflowError(f"{self.path} is being written by another process; wait for it to end") from None
        except OSError as error:
            raise KdflowError(f"{self.path} cannot be written to: {error.strerror}; give another output") from None
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk; only what the file beside it tells of counts
            self._file.close()

    def append(self, records: Sequence[Mapping[str, Any]], prompts: int) -> None:
        """Write what became of the next ``prompts`` prompts: first the lines, then that they are there."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
            self.progress.prompts += prompts
            self.progress.size += len(lines)
            self._tell()
        except OSError as error:
            raise KdflowError(
                f"{self.path} cannot be written to: {error.strerror}; the same command goes on where it stopped"
            ) from None

    def _tell(self) -> None:
        told = {"settings": self._settings, "progress": asdict(self.progress)}
        write_atomically(self._beside, json.dumps(told, indent=2) + "\n")

    def _restore(self) -> None:
        try:
            told = json.loads(self._beside.read_text(encoding="utf-8"))
            before, self.progress = told["settings"], Progress(**told["progress"])
            figures, meant = asdict(self.progress), asdict(Progress())
            if not isinstance(before, dict) or any(type(figures[name]) is not type(meant[name]) for name in meant):
                raise ValueError("a part of it is of another type")
        except (ValueError, TypeError, KeyError):
            raise KdflowError(f"{self._beside} is not what kdflow generate wrote; delete it and {self.path}") from None
        if changed := changes(before, self._settings):
            raise KdflowError(
                f"{self.path} was begun with other settings: {'; '.join(changed)}. Give the same ones to go on, or "
                "another output"
            )
        size = self.path.stat().st_size
        if size < self.progress.size:
            raise KdflowError(
                f"{self.path} is shorter than {self._beside.name} says: it was changed. Delete both to start afresh"
            )
        # A kill leaves more than was counted only where prompts were left: after the last count nothing is written.
        if size > self.progress.size and self.progress.prompts >= self._prompts:
            raise KdflowError(
                f"{self.path} is longer than {self._beside.name} says, and all prompts are answered: it was changed. "
                "There is nothing left to do; to start afresh delete both, or give another output"
            )
        self._file.truncate(self.progress.size)
