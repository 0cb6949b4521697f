"""Runs of models whose vocabularies differ in a special token alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kdflow
from kdflow.runtime.prepare import make_algorithm, prepare
from kdflow.runtime.tokenizers import open_tokenizers
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


def test_a_family_has_one_tokenizer_and_two_owners(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> None:
    renamed = rename_token(tiny["teacher"], tmp_path / "renamed", "<|im_start|>", "<|turn|>")
    for model, one in ((tiny["teacher"], True), (renamed, False)):
        config, plugins = prepare(run_file(teacher={"model": model}), (), ())
        tokenize, vocabulary = open_tokenizers(config, plugins, make_algorithm(config, plugins))
        student, teacher = tokenize.student, tokenize.teacher
        assert teacher is not None
        assert vocabulary is not None
        assert vocabulary.same
        assert (student.owner, teacher.owner) == ("student", "teacher")
        assert (student.tokenizer is teacher.tokenizer, student.bytes_of is teacher.bytes_of) == (one, one)
