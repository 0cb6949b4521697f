"""The processes of an engine: which there are, what they hold in ``/dev/shm``, and their end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

_SHARED = "/dev/shm/"


def members(group: int) -> list[int]:
    """Living processes of a process group, those that only wait to be reaped left out."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # After the name, which may hold anything: state, parent, process group.
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX" and int(fields[2]) == group:
                    found.append(int(entry))
    return found


def schedulers(group: int) -> list[int]:
    """Those of a process group that SGLang runs a model in."""
    found = []
    for process in members(group):
        with contextlib.suppress(OSError):
            if b"sglang::scheduler" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def shared_files() -> set[str]:
    """Everything in ``/dev/shm``."""
    return {os.path.join(_SHARED, name) for name in os.listdir(_SHARED)} if os.path.isdir(_SHARED) else set()


def held_files(group: int) -> set[str]:
    """What the processes of a group have mapped or open in ``/dev/shm``, told by inodes.

    SGLang and multiprocessing take their segments and semaphores away only when they end in peace. A semaphore is
    mapped under another name than it has, which is gone: its inode is the same.
    """
    inodes: set[int] = set()
    for process in members(group):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process}/maps").read_text(errors="replace").splitlines()
            inodes.update(int(line.split()[4]) for line in maps if _SHARED in line)
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()).startswith(_SHARED):
                        inodes.add(descriptor.stat().st_ino)
    found = set()
    for path in shared_files():
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino in inodes:
                found.add(path)
    return found


def end(group: int, folder: str, known: set[str], held: set[str], patience: float = 10.0) -> None:
    """Kill a process group, but for the caller, and remove what it would leave behind.

    Args:
        group: its number, which is that of its leader.
        folder: its temporary files.
        known: files in ``/dev/shm`` that were there before it: others'.
        held: those that it had at some time; what it holds now is added.
        patience: seconds to wait until the others are gone.
    """
    deadline = time.monotonic() + patience
    while True:
        others = [process for process in members(group) if process != os.getpid()]
        followers = [process for process in others if process != group]
        _send(signal.SIGSTOP, followers)  # else they could make a file after this look, and nobody would know of it
        found = held_files(group) - known
        _send(signal.SIGKILL, followers)
        # Each time, and not once they are gone: that may take long, and the caller may itself be ended meanwhile.
        for path in found | held - known:
            with contextlib.suppress(OSError):
                os.unlink(path)
        shutil.rmtree(folder, ignore_errors=True)
        # The leader comes last, and is not stopped: it watches, and does this itself if the caller is ended before.
        _send(signal.SIGKILL, [process for process in others if process == group])
        if not (others or found) or time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _send(number: signal.Signals, processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
