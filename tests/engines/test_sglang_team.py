"""Ranks that share an engine of SGLang, without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdflow.contracts import KdflowError
from kdflow.engines.sglang.options import SGLangOptions
from kdflow.engines.sglang.team import Team, count_engines, form_team

CPU = torch.device("cpu")

SHARING = """
import sys
import time
import torch
import torch.distributed as dist
from kdflow.contracts import KdflowError
from kdflow.engines.sglang.team import form_team

dist.init_process_group("gloo")
rank = dist.get_rank()
try:
    form_team(3, torch.device("cpu"), "the engine", 60.0)
    raise AssertionError("4 ranks do not share engines of 3 GPUs")
except KdflowError as error:
    assert "4 ranks of this machine cannot share engines of 3 GPUs evenly" in str(error), error
team = form_team(2, torch.device("cpu"), "the engine", 1.0)
assert (team.size, team.number, team.first_gpu) == (2, rank % 2, rank - rank % 2)
asked = []

def work(brought):
    asked.append(brought)
    if "fault" in brought:
        raise KdflowError(f"no answer to {brought}")
    return [one * 10 for one in brought]

assert team.ask(rank, work) == rank * 10
assert asked == ([[rank, rank + 1]] if team.leads else []), asked
try:
    team.ask("fault" if rank == 3 else "fine", work)
    assert rank < 2, "the other team has no fault"
except KdflowError as error:
    assert rank >= 2 and str(error) == "no answer to ['fine', 'fault']", (rank, error)
assert team.ask(rank, work) == rank * 10, "a fault leaves the team in step"
dist.barrier()
try:
    team.lead(lambda: time.sleep(3))
    raise AssertionError("nobody waits longer than the team's patience")
except RuntimeError as error:
    assert team.leads or "imed out" in str(error), error
dist.barrier()  # who is done must not leave while others are still connecting
dist.destroy_process_group()
"""


def test_ranks_of_a_team_ask_together_and_learn_of_faults(tmp_path: Path) -> None:
    script = tmp_path / "sharing.py"
    script.write_text(SHARING, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_a_process_alone_asks_for_itself() -> None:
    team = form_team(1, CPU, "the engine", 60.0)
    assert (team.size, team.leads, team.first_gpu) == (1, True, 0)
    assert team.ask(4, lambda brought: [one + 1 for one in brought]) == 5
    assert form_team(4, CPU, "the engine", 60.0).size == 1, "its engine goes on to further GPUs"
    assert isinstance(team, Team)


@pytest.mark.parametrize(
    ("gpus", "ranks", "devices", "engines"),
    [(1, 1, 2, 1), (1, 4, 8, 4), (4, 4, 8, 1), (2, 4, 8, 2), (1, 4, 7, 2), (1, 6, 8, 2), (8, 1, 9, 1), (1, 1, 8, 1)],
)
def test_engines_beside_the_ranks(gpus: int, ranks: int, devices: int, engines: int) -> None:
    found = count_engines(gpus, ranks, devices, "the engine")
    assert found == engines
    assert ranks % found == 0
    assert ranks + found * gpus <= devices


def test_engines_without_gpus_of_their_own_are_refused() -> None:
    with pytest.raises(KdflowError, match=r"2 an engine, and it has 4; start fewer ranks, or use placement colocated"):
        count_engines(2, 3, 4, "teacher.engine 'sglang'")


def test_processes_of_one_engine_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdflow.contracts import EngineContext

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5, 6, 7, 9})
    context = EngineContext(CPU, torch.float32)
    for options, expected in (({"tensor_parallel": 2}, "4,6,9|5,7"), ({}, None)):
        environment = SGLangOptions(**options).process({}, context)._environment
        assert environment.get("SGLANG_CPU_OMP_THREADS_BIND") == expected
