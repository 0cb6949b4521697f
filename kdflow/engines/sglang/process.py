"""The engine's process as the student's process sees it: started, asked, ended."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import IO, Any

from kdflow.contracts import KdflowError
from kdflow.engines.sglang import process_group
from kdflow.engines.sglang.kv_cache import KVCache

_log = logging.getLogger("kdflow")
_LOG_LINES, _LOG_BYTES = 20, 2**16
# Seconds between two looks at what the engine's processes hold. Most of it they take while they start; later a look,
# which takes 20 ms, would hold up the answers.
_LOOKS_AT_START, _LOOKS = 0.25, 5.0


class EngineDied(Exception):
    """The engine's process is gone, or did not answer in time and was ended."""


class EngineProcess:
    """One engine, ended with this object, with :meth:`stop`, or with this process.

    Args:
        arguments: of ``sglang.Engine``.
        environment: variables that it gets besides this process's own.
        start_timeout: seconds until the engine must be up.
        timeout: seconds until it must have answered.

    Attributes:
        version: of SGLang, once it was started.
        cache: of the engine as it was started last; None where SGLang does not tell.
    """

    def __init__(
        self, arguments: Mapping[str, Any], environment: Mapping[str, str], start_timeout: float, timeout: float
    ) -> None:
        self._arguments, self._environment = dict(arguments), dict(environment)
        self._start_timeout, self._timeout = start_timeout, timeout
        self._lock = threading.Lock()
        self._stop: weakref.finalize[Any, Any] | None = None
        self._closed = False
        self.version = ""
        self.cache: KVCache | None = None

    @property
    def running(self) -> bool:
        """Whether there is an engine that was not ended."""
        return self._stop is not None and self._stop.alive

    def start(self) -> None:
        """Start the engine and wait until it is up.

        Raises:
            EngineDied: it did not come up; holds the last lines that it printed.
            KdflowError: it is closed.
        """
        self.stop()
        known = process_group.shared_files()
        # Without a name, so that it can be read for as long as it is open, whoever took the folder away.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the engine
        # Short, since SGLang's sockets lie in it, whose paths may not be long.
        folder = os.path.join(tempfile.gettempdir(), f"kdflow-sglang-{secrets.token_hex(4)}")
        ours, theirs = socket.socketpair()
        life_reads, life_writes = os.pipe()
        told = map(str, (theirs.fileno(), life_reads, os.getpid(), folder))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kdflow.engines.sglang.server", *told],
            env=self._child_environment(folder), pass_fds=(theirs.fileno(), life_reads), stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        theirs.close()
        os.close(life_reads)
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._held = set[str]()
        self._stop = weakref.finalize(
            self, _end, os.getpid(), self._process, self._connection, self._log, life_writes, folder, known, self._held
        )
        os.mkdir(folder, 0o700)  # only now that there is a process that takes it away, if this one is killed
        if self._closed:  # by another thread, while the process was made
            self.stop()
            raise KdflowError("the engine of sglang is closed")
        self.version, self.cache = self._exchange(
            self._arguments, "start_timeout", self._start_timeout, _LOOKS_AT_START
        )
        self._look()
        _log.info(f"sglang {self.version} runs as process {self._process.pid}")

    def ask(self, *message: Any) -> Any:
        """Send a message and wait for the answer.

        Raises:
            EngineDied: there is no answer.
            KdflowError: the engine refuses what it was sent.
        """
        with self._lock:
            return self._exchange(message, "timeout", self._timeout, _LOOKS)

    def _exchange(self, message: Any, option: str, timeout: float, looks: float) -> Any:
        try:
            self._connection.send(message)
            deadline = time.monotonic() + timeout
            while not self._connection.poll(min(looks, max(0.0, deadline - time.monotonic()))):
                self._look()
                if time.monotonic() >= deadline:
                    told = f"it gave no answer in {timeout:g} s; if it needs longer, raise its {option}"
                    raise EngineDied(f"{told}{self._last_words()}")
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            told = self._last_words()
            self.stop()
            if self._closed:  # by another thread, for which nobody is to be told
                raise KdflowError("the engine of sglang is closed") from None
            raise EngineDied(f"its process ended{told}") from None
        except BaseException:
            self.stop()  # an answer that comes later would be taken for that to the next message
            raise
        if kind == "refused":
            raise KdflowError(f"sglang {self.version} refuses the request: {value}")
        return value

    def _look(self) -> None:
        """Note what its processes hold: it cannot be told once they have been killed."""
        self._held |= process_group.held_files(self._process.pid)

    def _last_words(self) -> str:
        if self._log.closed:  # by another thread, which closes the engine
            return ""
        # Not by seeking: the engine's processes write where this file stands.
        descriptor = self._log.fileno()
        printed = os.pread(descriptor, _LOG_BYTES, max(0, os.fstat(descriptor).st_size - _LOG_BYTES))
        said = [line for line in printed.decode(errors="replace").splitlines() if line.strip()][-_LOG_LINES:]
        return "; its last words:\n" + "\n".join(f"  {line}" for line in said) if said else ""

    def stop(self) -> None:
        """End every process of the engine; nothing of it is left."""
        if self._stop is not None:
            self._stop()

    def close(self) -> None:
        """End it for good: whoever asks it now, in another thread, does not start it again."""
        self._closed = True
        self.stop()

    def _child_environment(self, folder: str) -> dict[str, str]:
        # What torchrun announces is about the student's ranks; an engine of several processes would wait for these.
        of_ranks = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                    "MASTER_PORT", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME")  # fmt: skip
        kept = {
            key: value for key, value in os.environ.items()
            if key not in of_ranks and not key.startswith("TORCHELASTIC_")
        }  # fmt: skip
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "TMPDIR": folder, **self._environment}


def _end(
    owner: int, process: subprocess.Popen[bytes], connection: Connection[Any, Any], log: IO[bytes], life: int,
    folder: str, known: set[str], held: set[str],
) -> None:  # fmt: skip
    if os.getpid() != owner:
        return  # a fork of the owner, such as a data worker, ends: the engine is not its own
    process_group.end(process.pid, folder, known, held)
    connection.close()
    log.close()
    os.close(life)
    process.wait()
