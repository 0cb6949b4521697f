"""What the console shows."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from kdflow.contracts import KdflowError
from kdflow.runtime.run_directory import read_events
from kdflow.runtime.trackers import ConsoleTracker, JsonLines


def test_brackets_are_text_and_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run: dict[str, Any] = {
        "training": {"steps": 2},
        "teacher": None,
        "student": {"model": "models/[small]"},
        "algorithm": {"name": "sft"},
    }
    tracker = ConsoleTracker()
    tracker.start(tmp_path, run, 1)
    tracker.event({"event": "warning", "message": "tracking was ['console'] and is [bold]"})
    tracker.event({"event": "warning", "message": "runs/:smile:"})
    tracker.close()
    shown = capsys.readouterr().err
    assert "models/[small]" in shown
    assert "warning: tracking was ['console'] and is [bold]" in shown
    assert "runs/:smile:" in shown


def test_what_took_its_time_at_the_start_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"data": 0.04, "teacher": 3.21, "student": 4.0}
    ConsoleTracker().event({"event": "ready", "step": 0, "seconds": 7.5, "parts": parts})
    assert capsys.readouterr().err == "ready after 7.5 s · teacher 3.2 · student 4.0\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = JsonLines()
    tracker.start(tmp_path, {}, 1)
    with pytest.raises(KdflowError, match=r"metrics\.jsonl cannot be written to: No space left on device; mend it"):
        tracker.event({"event": "step"})
    tracker.close()


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(KdflowError, match=r"cannot be written to: Is a directory; mend it, or give another output$"):
        JsonLines().start(tmp_path, {}, 1)


def test_a_line_that_the_disk_had_no_room_for_is_written_when_there_is_some(tmp_path: Path) -> None:
    tracker, before = JsonLines(), resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker.start(tmp_path, {}, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, before[1]))
    try:
        with pytest.raises(KdflowError, match="cannot be written to: File too large; mend it"):
            tracker.event({"event": "step"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tracker.event({"event": "checkpoint"})
    tracker.close()
    assert [event["event"] for event in read_events(tmp_path / "metrics.jsonl")] == ["step", "checkpoint"]
