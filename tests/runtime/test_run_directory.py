"""What is told of a run directory, or of a place for a student, that a full disk or a broken file leaves unusable."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdflow
from kdflow.contracts import KdflowError
from kdflow.runtime import run_directory
from tests.support.commands import Command, command
from tests.support.models import write_jsonl

__all__ = ["command"]

RunFile = Callable[..., dict[str, Any]]
ROOM = 2000  # bytes: for small files, and for no weights


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process grows beyond some bytes; Python has the signal of it ignored."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["environment.json", "run.yaml", "summary.json", "metrics.jsonl"])
def test_a_file_of_a_run_that_cannot_be_written_is_named(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = run_directory.write_atomically

    def full(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)

    run = run_file(training={"steps": 1})
    if name == "metrics.jsonl":
        kdflow.train(run)
    monkeypatch.setattr(run_directory, "write_atomically", full)
    with pytest.raises(KdflowError) as caught:
        kdflow.train(run, resume="auto")
    told = f"{tmp_path / 'run' / name} cannot be written: No space left on device; mend it, and go on by --resume auto"
    assert str(caught.value) == told
    monkeypatch.undo()
    assert kdflow.train(run, resume="auto").steps == 1


def test_metrics_that_are_a_directory_are_named_by_a_resume(run_file: RunFile, tmp_path: Path) -> None:
    run = run_file(training={"steps": 1})
    kdflow.train(run)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(KdflowError) as caught:
        kdflow.train(run, resume="auto")
    assert str(caught.value) == f"{metrics} cannot be read: Is a directory; move it away, or mend it"


BROKEN = {
    b"\xff\n": "no UTF-8: invalid start byte",
    b"null\n": "no event of a run, which has a name and a step",
    b"{}\n": "no event of a run, which has a name and a step",
    b'{"event": "step", "step": "1"}\n': "no event of a run, which has a name and a step",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_line_that_is_no_event_is_named_by_resume_and_report(
    command: Command, run_file: RunFile, tmp_path: Path, line: bytes
) -> None:
    run = run_file(training={"steps": 1})
    kdflow.train(run)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([lines[0], line, *lines[1:]]))
    told = f"{metrics}:2: this line is {BROKEN[line]}; take it out"
    with pytest.raises(KdflowError) as caught:
        kdflow.train(run, resume="auto")
    assert str(caught.value) == told
    result = command("report", tmp_path / "run")
    assert (result.code, result.err) == (2, f"error: {told}\n")
    metrics.write_bytes(b"".join(lines))
    assert command("report", tmp_path / "run").code == 0


def test_a_student_that_is_evaluated_needs_room_for_temporary_files(
    command: Command, run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "2 + 2 = ", "answer": "4"}])
    run = run_file(training={"steps": 1}, evaluation=[{"name": "exact_match", "path": asked, "max_new_tokens": 2}])
    kdflow.train(run)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "small").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "small"))
    room = "set TMPDIR to a folder with room for the student"
    with full_disk():
        result = command("evaluate", tmp_path / "run.yaml")
    assert (result.code, result.out) == (2, "")
    assert "Traceback" not in result.err
    assert f"{tmp_path / 'small'}/kdflow-evaluate-" in result.err
    assert result.err.endswith(f"/student: File too large; {room}\n")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    result = command("evaluate", tmp_path / "run.yaml")
    assert result.code == 2
    assert result.err.startswith("error: there is no room for temporary files: ")
    assert result.err.endswith(f"; {room}\n")


def test_a_student_that_cannot_be_written_is_told(command: Command, run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file(training={"steps": 1}))
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file()))
    generate = ["generate", tmp_path / "run.yaml", "--checkpoint", tmp_path / "run", "--prompts", prompts,
                "--max-new-tokens", 4]  # fmt: skip
    for arguments in (["export", tmp_path / "run"], generate):
        with full_disk():
            result = command(*arguments, "-o", tmp_path / "out")
        assert (result.code, result.out) == (2, "")
        assert "Traceback" not in result.err
        assert result.err.endswith("give another output\n")
        assert ": File too large; " in result.err
        assert not (tmp_path / ".out.student").exists()


def test_a_tokenizer_that_cannot_be_written_is_told(
    command: Command, run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library behind tokenizers has no class of its own for what the disk says."""
    kdflow.train(run_file(training={"steps": 1}))
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *_: None)
    with full_disk():
        result = command("export", tmp_path / "run", "-o", tmp_path / "out")
    assert result.err.endswith(f"cannot be exported to {tmp_path / 'out'}: File too large; give another output\n")


def test_a_student_cut_in_depth_that_engines_cannot_be_given_is_told(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_file(student={"model": tiny["student"], "keep_layers": [0]}, teacher={"follow": {"every": 1}})
    run["teacher"].pop("model", None)
    with full_disk(), pytest.raises(KdflowError) as caught:
        kdflow.train(run)
    student = tmp_path / "run" / ".student"
    told = f"{student}, the student as engines load it, cannot be written: File too large; make room, or give another "
    assert str(caught.value) == f"{told}output"
    assert not student.exists()


def test_a_checkpoint_that_no_disk_takes_is_named(command: Command, run_file: RunFile, tmp_path: Path) -> None:
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "2 + 2 = ", "answer": "4"}])
    run = run_file(evaluation=[{"name": "exact_match", "path": asked}])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    long = tmp_path / ("a" * 300)
    told = f"error: {long} cannot be read: File name too long; give a run directory or a checkpoint\n"
    arguments = ["--prompts", asked, "-o", tmp_path / "out.jsonl"]
    for start in (["evaluate", tmp_path / "run.yaml"], ["generate", tmp_path / "run.yaml", *arguments]):
        result = command(*start, "--checkpoint", long)
        assert (result.code, result.err) == (2, told)
