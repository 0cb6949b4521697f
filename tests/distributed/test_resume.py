"""Killed at any moment, a run goes on as if nothing had happened: real processes, real SIGKILL."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from kdflow.runtime.checkpoint import RUN_STATE, verify, write_manifest
from kdflow.runtime.launch import launch
from tests.support.processes import children, until
from tests.support.runs import events, finish, interrupted, kill_when, make_run, saved, start, train, trajectory

RunFile = Callable[..., dict[str, Any]]
STEPS = 10


TRAINING = {"steps": STEPS, "tokens_per_step": 1000, "checkpoint_every": 2, "keep_checkpoints": 4, "evaluate_every": 5}


@pytest.fixture
def run(run_file: RunFile, tmp_path: Path) -> dict[str, Any]:
    return run_file(training=TRAINING, output=str(tmp_path / "killed"))


@pytest.fixture(scope="module")
def uninterrupted(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed; tests that change it work on a copy."""
    output = tmp_path_factory.mktemp("resume") / "whole"
    train(make_run(tiny, training=TRAINING, output=str(output)))
    assert [step for step, *_ in trajectory(output)] == list(range(1, STEPS + 1))
    return output


def test_kills_at_any_moment_leave_the_trajectory_bitwise(run: dict[str, Any], uninterrupted: Path) -> None:
    output = Path(run["output"])
    checkpoints = output / "checkpoints"
    # Before the first checkpoint, in the middle of writing one, just after one, and between two.
    moments: list[Callable[[], bool]] = [
        lambda: bool(events(output, "step")),
        lambda: any(checkpoints.glob(".step-*")),
        lambda: (checkpoints / "step-00000004").exists(),
        lambda: len(events(output, "step")) >= 7,
    ]
    for moment in moments:
        kill_when(start(run, "--resume", "auto"), moment)
        assert all(verify(path) is None for path in checkpoints.glob("step-*")), "a checkpoint with its name is whole"
    printed = finish(start(run, "--resume", "auto"))
    assert "Traceback" not in printed
    assert trajectory(output) == trajectory(uninterrupted)
    for key in ("divergence", "cross_entropy", "agreement"):
        assert [e[key] for e in events(output, "eval")] == [e[key] for e in events(uninterrupted, "eval")]
    summaries = [json.loads((path / "summary.json").read_text()) for path in (output, uninterrupted)]
    for key in ("steps", "tokens", "loss", "samples", "evaluation"):
        assert summaries[0][key] == summaries[1][key]
    assert not list(checkpoints.glob(".step-*"))


def test_two_ranks_killed_and_resumed(run: dict[str, Any], tmp_path: Path) -> None:
    whole = {**run, "output": str(tmp_path / "whole")}
    train(whole, "--nproc-per-node", "2")
    output = Path(run["output"])
    kill_when(start(run, "--nproc-per-node", "2"), lambda: len(events(output, "step")) >= 5)
    train(run, "--nproc-per-node", "2", "--resume", "auto")
    assert trajectory(output) == trajectory(whole["output"])


def test_another_number_of_ranks_keeps_the_order_of_the_data(run: dict[str, Any], uninterrupted: Path) -> None:
    output = Path(run["output"])
    kill_when(start(run), lambda: (output / "checkpoints" / "step-00000004").exists())
    train(run, "--nproc-per-node", "2", "--resume", "auto")
    assert trajectory(output, ["samples", "learning_rate"]) == trajectory(uninterrupted, ["samples", "learning_rate"])
    expected = [loss for _, loss in trajectory(uninterrupted, ["loss"])]
    assert [loss for _, loss in trajectory(output, ["loss"])] == pytest.approx(expected, rel=2e-5)


def _back_to_step_6(uninterrupted: Path, run: dict[str, Any]) -> Path:
    """A copy of the finished run that has just reached step 6."""
    return interrupted(uninterrupted, Path(run["output"]), 6)


def test_the_optimizer_is_really_loaded(run: dict[str, Any], uninterrupted: Path) -> None:
    """A checkpoint with one altered optimizer tensor, valid in itself, gives another trajectory."""
    output = _back_to_step_6(uninterrupted, run)
    path = output / "checkpoints" / "step-00000006"
    tensors = saved(path)
    altered = next(name for name in tensors if name.endswith("embed_tokens.weight.exp_avg"))
    tensors[altered] += 1e-2
    state = (path / RUN_STATE).read_text()
    shutil.rmtree(path)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    (path / RUN_STATE).write_text(state)
    write_manifest(path)

    train(run, "--resume", "auto")
    ours, theirs = trajectory(output, ["loss"]), trajectory(uninterrupted, ["loss"])
    assert ours[:7] == theirs[:7]  # step 7's loss is computed before the optimizer moves
    assert all(one != other for one, other in zip(ours[7:], theirs[7:], strict=True))


@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "missing file", "no manifest"])
def test_a_damaged_newest_checkpoint_falls_back(run: dict[str, Any], uninterrupted: Path, damage: str) -> None:
    output = _back_to_step_6(uninterrupted, run)
    newest = output / "checkpoints" / "step-00000006"
    shard = next(newest.glob("*.distcp"))
    if damage == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "cut off":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing file":
        shard.unlink()
    else:
        (newest / "manifest.json").unlink()
    train(run, "--resume", "auto")
    warning = events(output, "warning")[0]["message"]
    assert "step-00000006" in warning
    assert "damaged" in warning
    assert events(output, "resumed")[-1]["step"] == 4
    assert trajectory(output) == trajectory(uninterrupted)
    assert verify(newest) is None, "the damaged checkpoint was replaced when its step came again"


def test_resume_says_what_has_changed_and_finished_runs_stay_finished(run: dict[str, Any], uninterrupted: Path) -> None:
    output = Path(run["output"])
    shutil.copytree(uninterrupted, output, symlinks=True)
    train({**run, "training": {**TRAINING, "weight_decay": 0.1}}, "--resume", "auto")
    assert trajectory(output) == trajectory(uninterrupted)
    told = [event["message"] for event in events(output, "warning")]
    assert any("training.weight_decay was 0.0 and is 0.1" in message for message in told)


def test_a_launcher_is_no_rank_afterwards() -> None:
    launch(1, [sys.executable, "-c", "import os; assert os.environ['KDFLOW_LAUNCHER'] == str(os.getppid())"])
    assert not {"KDFLOW_LAUNCHER", "KDFLOW_STORE"} & set(os.environ)


def test_ranks_end_with_a_launcher_that_is_killed(run_file: RunFile, tmp_path: Path) -> None:
    run = run_file(training={"steps": 100_000}, output=str(tmp_path / "run"))
    launcher = start(run, "--nproc-per-node", "2")
    until(lambda: bool(events(run["output"], "step")) or launcher.poll() is not None, "the first step")
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    launcher.kill()
    launcher.communicate(timeout=60)  # their end of the pipe is closed
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), "the end of the ranks")
