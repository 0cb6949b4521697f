"""Two machines, as far as torchrun can tell: two agents that meet on the loopback interface, and one of them dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdflow
from tests.support.processes import children, until
from tests.support.runs import events, finish, trajectory

RunFile = Callable[..., dict[str, Any]]
STEPS = 40


def agent(file: Path, port: int, is_host: bool) -> subprocess.Popen[str]:
    """What a user starts on one of two machines."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run", "--local-addr",
        "127.0.0.1", "--rdzv-conf", f"is_host={int(is_host)}", "-m", "kdflow", "train", str(file), "--resume", "auto",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                   # Else a machine that comes later waits for an address that only the first meeting was told.
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True)  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """The machine: the agent, and its workers, which lead sessions of their own."""
    for one in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def descendants(parent: int) -> list[int]:
    return [one for child in children(parent) for one in (child, *descendants(child))]


@pytest.mark.timeout(600)
def test_a_machine_that_dies_is_replaced_and_the_run_goes_on(run_file: RunFile, tmp_path: Path) -> None:
    training = {"steps": STEPS, "tokens_per_step": 400, "checkpoint_every": 1}
    made = run_file(training=training, output=str(tmp_path / "two"))
    kdflow.train({**made, "output": str(tmp_path / "one")})
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host, second = agent(file, port, True), agent(file, port, False)
    try:
        until(lambda: len(events(tmp_path / "two", "step")) >= 3, "the third step")
        kill(second)
        second = agent(file, port, False)
        finish(host)
        finish(second)
    finally:
        for process in (host, second):
            kill(process)
    (resumed,) = events(tmp_path / "two", "resumed")
    assert 1 <= resumed["step"] < STEPS
    for key in ("samples", "learning_rate", "tokens"):
        assert trajectory(tmp_path / "two", [key]) == trajectory(tmp_path / "one", [key])
    for key in ("loss", "grad_norm"):
        expected = [value for _, value in trajectory(tmp_path / "one", [key])]
        assert [value for _, value in trajectory(tmp_path / "two", [key])] == pytest.approx(expected, rel=1e-4)
