"""The student's own responses do not depend on ranks, and are written again after a kill: real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdflow
from tests.runtime.test_rollouts import on_policy as on_policy
from tests.support.runs import events, kill_when, start, train, trajectory

RunFile = Callable[..., dict[str, Any]]


def responses(output: Path) -> dict[str, str]:
    return {file.name: file.read_text(encoding="utf-8") for file in (output / "rollouts").iterdir()}


@pytest.mark.parametrize(("teacher", "sleep"), [("teacher", False), ("foreign", True)])
def test_one_process_equals_two_ranks(
    on_policy: RunFile, tiny: dict[str, str], tmp_path: Path, teacher: str, sleep: bool
) -> None:
    """Also where the engines of the two sleep in between."""
    made = on_policy(
        teacher={"model": tiny[teacher]}, algorithm={"name": "uld" if teacher == "foreign" else "jsd"},
        rollout={"fraction": 0.6, "n": 2, "save": True}, output=str(tmp_path / "one"),
    )  # fmt: skip
    kdflow.train(made)
    made["teacher"], made["rollout"] = ({**made[name], "sleep": sleep} for name in ("teacher", "rollout"))
    # While a checkpoint is written, ranks also tell one another their responses.
    made["training"] = {**made["training"], "checkpoint_every": 1}
    train({**made, "output": str(tmp_path / "two")}, "--nproc-per-node", "2")
    for key in ("samples", "target_tokens", "tokens", "rollouts", "rollout_tokens", "rollout_stopped"):
        assert trajectory(tmp_path / "two", [key]) == trajectory(tmp_path / "one", [key])
    for key in ("loss", "grad_norm"):
        expected = [value for _, value in trajectory(tmp_path / "one", [key])]
        assert [value for _, value in trajectory(tmp_path / "two", [key])] == pytest.approx(expected, rel=1e-4)
    assert max(event["rollout_gap"] for event in events(tmp_path / "two", "step")) < 1e-4
    both = [responses(tmp_path / name) for name in ("one", "two")]
    assert [text.count("\n") for text in both[0].values()] == [text.count("\n") for text in both[1].values()]


def test_killed_and_resumed_between_two_syncs(on_policy: RunFile, tmp_path: Path) -> None:
    made = on_policy(
        rollout={"fraction": 0.5, "sync_every": 3, "save": True}, output=str(tmp_path / "killed"),
        training={"steps": 8, "checkpoint_every": 4},
    )  # fmt: skip
    train({**made, "output": str(tmp_path / "whole")})
    kill_when(start(made), lambda: (tmp_path / "killed" / "checkpoints" / "step-00000004").exists())
    train(made, "--resume", "auto")
    assert events(tmp_path / "killed", "resumed")
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
    assert responses(tmp_path / "killed") == responses(tmp_path / "whole")
