"""Events reach every tracker, and every tracker that has started is closed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kdflow.contracts import KdflowError, Tracker
from kdflow.runtime.events import Events
from kdflow.runtime.trackers import JsonLines


class Diary(Tracker):
    """Notes what it hears; fails where it is told to."""

    name = "diary"

    def __init__(self, notes: list[str], who: str, fails: str | None = None) -> None:
        super().__init__()
        self._notes, self._who, self._fails = notes, who, fails

    def _note(self, what: str) -> None:
        self._notes.append(f"{self._who}: {what}")
        if what == self._fails:
            raise OSError(f"{self._who} cannot {what}")

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        self._note("start")

    def event(self, event: Mapping[str, Any]) -> None:
        self._note(event["event"])

    def close(self) -> None:
        self._note("close")


def test_every_tracker_hears_everything() -> None:
    notes: list[str] = []
    events = Events([Diary(notes, "one"), Diary(notes, "other")])
    events.start(Path(), {}, 1)
    events.emit("step", step=1)
    events.close()
    for who in ("one", "other"):
        assert [note for note in notes if note.startswith(f"{who}:")] == [
            f"{who}: {what}" for what in ("start", "step", "close")
        ]


class Scrub(Tracker):
    """Empties what it hears, in place."""

    name = "scrub"

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        run["training"].clear()

    def event(self, event: Mapping[str, Any]) -> None:
        event["phases"].clear()

    def close(self) -> None:
        pass


def test_what_a_tracker_does_to_an_event_is_its_own_affair(tmp_path: Path) -> None:
    run, phases = {"training": {"steps": 4}}, {"data": 0.5}
    events = Events([Scrub(), JsonLines()])
    events.start(tmp_path, run, 1)
    events.emit("step", step=1, phases=phases)
    events.close()
    assert (run, phases) == ({"training": {"steps": 4}}, {"data": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"event": "step", "step": 1, "phases": phases}


def test_every_tracker_hears_what_another_one_fails_at() -> None:
    notes: list[str] = []
    events = Events([Diary(notes, "bad", "step"), Diary(notes, "other")])
    events.start(Path(), {}, 1)
    with pytest.raises(KdflowError, match=r"tracker 'diary' failed at the event 'step': OSError: bad cannot step"):
        events.emit("step", step=1)
    assert notes[2:] == ["bad: step", "other: step"]


def test_a_tracker_that_cannot_start_leaves_none_open() -> None:
    notes: list[str] = []
    events = Events([Diary(notes, "one"), Diary(notes, "bad", "start"), Diary(notes, "late")])
    told = (
        r"^tracker 'diary' failed at the run's start: OSError: bad cannot start; mend it, or take it out of tracking$"
    )
    with pytest.raises(KdflowError, match=told):
        events.start(Path(), {}, 1)
    events.close()
    assert notes == ["one: start", "bad: start", "one: close"]


def test_a_tracker_that_cannot_close_does_not_keep_others_open() -> None:
    notes: list[str] = []
    events = Events([Diary(notes, "one"), Diary(notes, "bad", "close"), Diary(notes, "other")])
    events.start(Path(), {}, 1)
    with pytest.raises(KdflowError, match=r"^tracker 'diary' failed at the run's end: OSError: bad cannot close; mend"):
        events.close()
    assert {note for note in notes if note.endswith("close")} == {"one: close", "bad: close", "other: close"}


def test_a_tracker_that_cannot_close_does_not_hide_what_the_run_ended_of(caplog: pytest.LogCaptureFixture) -> None:
    events = Events([Diary([], "bad", "close")])
    events.start(Path(), {}, 1)

    def run() -> None:
        with ExitStack() as closing:
            closing.callback(events.close)
            raise KdflowError("no data")

    with pytest.raises(KdflowError, match=r"^no data$"):
        run()
    assert "tracker 'diary' failed at the run's end: OSError: bad cannot close" in caplog.text
