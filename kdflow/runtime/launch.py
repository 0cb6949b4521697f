"""Several ranks on one machine, by torch's elastic agent."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
import traceback
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdflow.contracts import KdflowError
from kdflow.runtime.lifetime import LAUNCHER
from kdflow.runtime.processes import STORE, lost_a_peer

_INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
_LATER = 3600  # seconds


class RankFailed(KdflowError):
    """What the first rank that failed left as its last word."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(processes: int, command: list[str]) -> None:
    """Run ``command`` as ``processes`` ranks and wait. They meet in files, and speak over the loopback interface.

    Raises:
        RankFailed: some rank failed; the message and the exit code are those of the first.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Ranks share the threads that this process would have: as many as cores it may use. More make every one slower.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    # The first rank's word is enough. The agent's logger has a level of its own.
    for logger in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="kdflow-ranks-") as folder:
        # In files: torch unpickles what it finds in the agents' store, and one of TCP listens to every network.
        os.environ[STORE] = f"{folder}/ranks"
        os.environ[LAUNCHER] = str(os.getpid())
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint=f"{folder}/agent", rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1", logs_specs=DefaultLogsSpecs(f"{folder}/words"),
        )  # fmt: skip
        try:
            elastic_launch(config, entrypoint=command[0])(*command[1:])
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            raise RankFailed(
                f"interrupted by {name}: --resume auto goes on from the last checkpoint, if there is one",
                128 + int(error.sigval),
            ) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            if code < 0 or code == _INTERRUPTED:
                number = signal.SIGINT if code == _INTERRUPTED else signal.Signals(-code)
                ended = "interrupted" if code == _INTERRUPTED else "killed"
                raise RankFailed(
                    f"rank {rank} was {ended} by {number.name}; go on with --resume auto", 128 + number
                ) from None
            told = _last_word(failure.error_file) or f"rank {rank} ended with the exit code {code}"
            raise RankFailed(told, code) from None
        finally:  # this process is no rank
            del os.environ[STORE], os.environ[LAUNCHER]


def leave_last_word(error: Exception) -> bool:
    """In a rank that :func:`launch` started, leave the error to it, which tells the first one; elsewhere nothing."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if STORE not in os.environ or not file:
        return False
    told = str(error)
    if not isinstance(error, KdflowError):
        told = f"rank {os.environ['RANK']} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"
    # The agent takes the earliest for the first: what only lost its peers comes behind what these ended of.
    when = int(time.time()) + (_LATER if lost_a_peer(error) else 0)
    word = {"message": told, "extraInfo": {"timestamp": str(when)}}
    Path(file).write_text(json.dumps({"message": word}), encoding="utf-8")
    return True


def _last_word(file: str) -> str | None:
    try:
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["message"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
