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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def kill(process: subprocess.Popen[str]) -> None:
    """The machine: the agent, and its workers, which lead sessions of their own."""
    for one in (process.pid, *descendants(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def descendants(parent: int) -> list[int]:
    return [one for child in children(parent) for one in (child, *descendants(child))]


def two(
    run: dict[str, Any], folders: tuple[Path, Path], *overrides: str, command: tuple[str, ...] = ("train",)
) -> list[str]:
    """What two ranks print, one on each of two machines, as a cluster starts them; ``overrides`` are the second's."""
    port, processes = free_port(), []
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}  # fmt: skip
        words = [sys.executable, "-m", "kdflow", *command, "run.yaml", *(overrides if rank else ())]
        processes.append(subprocess.Popen(words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT))  # fmt: skip
    return [finish(process, code=2) for process in processes]


def test_a_run_directory_that_is_not_shared_is_refused(run_file: RunFile, tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for printed in two(run_file(output="run"), folders):
        assert "output: rank 1 does not see what rank 0 writes into run; give a directory" in printed
    assert not list((tmp_path / "one" / "run").glob(".kdflow-*"))


def test_machines_with_another_run_or_other_data_are_refused(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path
) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    run = run_file(output=str(tmp_path / "run"), data={"train": [{"path": "train.jsonl", "format": "text"}]})
    whole = Path(tiny["train"]).read_bytes()
    for folder, kept in zip(folders, (len(whole), whole.index(b"\n") + 1), strict=True):
        folder.mkdir()
        (folder / "train.jsonl").write_bytes(whole[:kept])
    told = "ranks disagree on the run: training.learning_rate is 0.01 to rank 0 and 1e-05 to rank 1; give every machine"
    assert all(told in printed for printed in two(run, folders, "training.learning_rate=1e-5"))
    assert all("ranks disagree on the training data: train.jsonl is" in printed for printed in two(run, folders))


def test_commands_of_one_process_are_refused_as_several_ranks(run_file: RunFile, tmp_path: Path) -> None:
    evaluation = [{"name": "exact_match", "path": "questions.jsonl"}]
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "questions.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n', encoding="utf-8")
    run = run_file(output=str(tmp_path / "run"), evaluation=evaluation)
    for printed in two(run, (folder, folder), command=("evaluate",)):
        assert "kdflow evaluate runs in one process; start it without a launcher" in printed


@pytest.mark.timeout(600)
def test_a_machine_that_dies_is_replaced_and_the_run_goes_on(run_file: RunFile, tmp_path: Path) -> None:
    training = {"steps": STEPS, "tokens_per_step": 400, "checkpoint_every": 1}
    made = run_file(training=training, output=str(tmp_path / "two"))
    kdflow.train({**made, "output": str(tmp_path / "one")})
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    port = free_port()
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
