"""``kdflow report``: what the page of a run says, and what curves are made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import kdflow
from kdflow.cli.curves import curves
from kdflow.cli.report import page
from tests.support.commands import Command, WriteRun
from tests.support.runs import events

RunFile = Callable[..., dict[str, Any]]
VOID = {"meta"}


class Checked(HTMLParser):
    """Every tag is closed in its turn, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        assert tag not in ("script", "link")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("line", "polyline")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> str:
    """The same, after a look at its tags."""
    parser = Checked()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return text


def test_the_page_of_a_run(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(training={"steps": 4, "evaluate_every": 1})
    assert command("train", run).out.count(f"kdflow report {tmp_path / 'run'}") == 1
    result = command("report", tmp_path / "run")
    assert (result.code, result.out) == (0, f"{tmp_path / 'run' / 'report.html'}\n")
    text = read((tmp_path / "run" / "report.html").read_text("utf-8"))
    told = events(tmp_path / "run", "eval")
    for figure in (f"{told[0]['divergence']:.3f}", f"{told[-1]['divergence']:.3f}", "before training", "after step 4"):
        assert figure in text
    for title in ("loss, a target token", "gradient norm", "tokens a second", "seconds a step", "learning_rate: "):
        assert title in text
    assert text.count("<svg") == 9
    assert "and not over" not in text


def test_a_run_that_is_not_over_has_a_page(command: Command, run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file(training={"steps": 2}))
    (tmp_path / "run" / "summary.json").unlink()
    assert command("report", tmp_path / "run", "-o", tmp_path / "page.html").code == 0
    assert "2, and not over" in read((tmp_path / "page.html").read_text("utf-8"))


def test_a_page_leaves_its_neighbours_alone(command: Command, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "ready"}\n')
    (tmp_path / ".page").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("page", "folder"):
        command("report", tmp_path, "-o", tmp_path / name)
    assert (tmp_path / ".page").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", ".page", "page", "folder"}
    assert (tmp_path / "page").stat().st_mode == (tmp_path / ".page").stat().st_mode


def test_what_is_no_run_is_refused(command: Command, tmp_path: Path) -> None:
    result = command("report", tmp_path)
    assert result.code != 0
    assert f"{tmp_path} holds no metrics.jsonl" in result.err


def test_what_cannot_be_read_or_written_is_named(command: Command, tmp_path: Path) -> None:
    metrics, summary = tmp_path / "metrics.jsonl", tmp_path / "summary.json"
    metrics.write_text('{"event": "ready"}\n{"event": \n')
    assert f"{metrics}:2: this line is no JSON: " in command("report", tmp_path).err
    metrics.write_text('{"event": "ready"}\n{"event": ')  # which a kill cut off
    summary.write_text("{\n")
    assert f"{summary}:2: this is no JSON: " in command("report", tmp_path).err
    summary.unlink()
    result = command("report", tmp_path, "-o", tmp_path)
    assert f"{tmp_path} is a directory; give a file for -o, such as {tmp_path}/report.html" in result.err


@pytest.mark.parametrize("name", ["run.yaml", "environment.json", "summary.json"])
def test_a_file_that_is_no_text_is_named(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "ready"}\n')
    (tmp_path / name).write_bytes(b"a: 1\n\xff\n")
    told = f"error: {tmp_path / name}:2: this is no UTF-8: invalid start byte; mend it, or move the file away\n"
    assert command("report", tmp_path).err == told


@pytest.mark.parametrize(("event", "summary", "told"), [
    ('{"event": "step", "step": 1}', "null", "/summary.json is no summary of a run, which is a mapping; move it away"),
    ('{"event": "step", "step": 1}', '{"steps": 1}',
     ": metrics.jsonl or summary.json lacks 'tokens'; put back what the run wrote"),
    ('{"event": "ready"}', '{"samples": null, "skipped": []}',
     ": metrics.jsonl or summary.json lacks 'wall_seconds'; put back what the run wrote"),
    ('{"event": "ready"}', '{"samples": [], "wall_seconds": "long"}',
     ": metrics.jsonl or summary.json is at fault: "),
])  # fmt: skip
def test_what_lacks_figures_of_a_run_is_refused(
    command: Command, tmp_path: Path, event: str, summary: str, told: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{event}\n")
    (tmp_path / "summary.json").write_text(summary)
    result = command("report", tmp_path)
    assert (result.code, result.err.startswith(f"error: {tmp_path}{told}")) == (2, True), result.err


def test_paths_that_no_disk_takes_are_named(command: Command, tmp_path: Path) -> None:
    long = tmp_path / ("a" * 300)
    told = f"error: {long} cannot be read: File name too long; give the output directory of a run\n"
    assert (command("report", long).code, command("report", long).err) == (2, told)
    (tmp_path / "metrics.jsonl").write_text('{"event": "ready"}\n')
    told = f"error: {long} cannot be written: File name too long; give another -o\n"
    assert command("report", tmp_path, "-o", long).err == told


def test_metrics_warnings_and_text_are_shown_and_escaped() -> None:
    steps: list[dict[str, Any]] = [
        {"event": "step", "step": step, "loss": 1.0 / step, "grad_norm": 0.1, "learning_rate": 1e-5, "tokens": 100,
         "seconds": 2.0, "phases": {"data": 0.5, "rollout": 0.0, "student": 1.0}, "memory_bytes": 2**30, "ce": 0.5}
        for step in range(1, 4)
    ]  # fmt: skip
    told = [
        *steps, {"event": "warning", "step": 2, "message": "a <b> of 'x'"}, {"event": "resumed", "step": 1},
        {"event": "sample", "step": 0, "prompt": "1 < 2 ", "text": "& <so>"},
    ]  # fmt: skip
    text = read(page("<name>", told, None, {"run.yaml": "a: <1>"}))
    for shown in ("&lt;name&gt;", "a &lt;b&gt; of &#x27;x&#x27;", "step 1: resumed", "1 &lt; 2 ", "&amp; &lt;so&gt;",
                  "a: &lt;1&gt;", "<figcaption>ce</figcaption>", "<td>tokens a second</td><td>50</td>",
                  "<td>student</td><td>3.00</td><td>50.0%</td>",
                  "<td>other</td><td>1.50</td><td>25.0%</td>"):  # fmt: skip
        assert shown in text
    assert "<td>rollout</td>" not in text, "a phase that no step had"
    read(page("empty", [], None, {}))


def test_a_run_of_one_step_has_no_curves() -> None:
    assert curves("loss", {"loss": [(1, 0.5)]}) == ""
    assert curves("loss", {"loss": [(1, math.nan), (2, math.inf), (3, 1.0)]}) == ""


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1.0], ["0", "0.5", "1"]),
        ([3.0, 3.0], ["1", "2", "3", "4", "5"]),
        ([0.3, 0.1 + 0.2], ["0.2", "0.3", "0.4"]),
        ([-2e-5, 1e-5], ["-2e-05", "-1e-05", "0", "1e-05"]),
        ([1e9, 4.1e9], ["1e+09", "2e+09", "3e+09", "4e+09", "5e+09"]),
    ],
)
def test_values_lie_between_round_numbers(values: list[float], labels: list[str]) -> None:
    drawn = curves("x", {"x": list(enumerate(values, start=1))})
    found = re.findall(r'class="value"[^>]*>([^<]*)<', drawn)
    assert [float(one) for one in found] == sorted(float(one) for one in found)
    assert float(found[0]) <= min(values)
    assert max(values) <= float(found[-1])
    assert set(labels) & set(found)
    heights = [float(one) for one in re.findall(r",(\d+\.\d)", re.findall(r'points="([^"]*)"', drawn)[0])]
    assert all(10 <= height <= 184 for height in heights)


def test_long_runs_are_thinned_to_means() -> None:
    points = [(step, float(step % 2)) for step in range(1, 100_001)]
    drawn = re.findall(r'points="([^"]*)"', curves("loss", {"loss": points}))[0].split()
    assert len(drawn) <= 600
    assert len({point.split(",")[1] for point in drawn[:-1]}) <= 2, "every mean is one half, or near it"
