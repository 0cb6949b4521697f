"""Runs of models whose vocabularies differ in a special token alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kdflow
from tests.support.models import rename_token
from tests.support.runs import events, trajectory

RunFile = Callable[..., dict[str, Any]]


def test_a_renamed_special_token_is_a_warning_and_changes_nothing(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    renamed = rename_token(tiny["teacher"], tmp_path / "renamed", "<|im_start|>", "<|turn|>")
    plain = kdflow.train(run_file(output=str(tmp_path / "plain")))
    other = kdflow.train(run_file(output=str(tmp_path / "other"), teacher={"model": renamed}))
    assert trajectory(other.output) == trajectory(plain.output)
    (warning,) = events(other.output, "warning")
    assert warning["message"] == (
        "student and teacher share a vocabulary, but an added token differs, "
        "id 1: '<|im_start|>' to the student and '<|turn|>' to the teacher"
    )
    assert events(plain.output, "warning") == []
