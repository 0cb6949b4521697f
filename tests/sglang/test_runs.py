"""Whole runs with a teacher in SGLang: the trajectory, real signals, and what is left afterwards."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdflow
from kdflow.config import Choice
from kdflow.runtime.capture import capture
from tests.sglang.support import engines_below, engines_of, gone, held_files, killed_until_it_fails, schedulers, until
from tests.support.runs import events, finish, make_run, start, train, trajectory

RunFile = Callable[..., dict[str, Any]]
STEPS = 20
TRAINING = {"steps": STEPS, "tokens_per_step": 400, "checkpoint_every": 1}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary files of the run, apart from those of others."""
    folder = tmp_path / "tmp"  # short, as the paths of sockets in it must be
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def on_sglang(run_file: RunFile, name: str, tmp_path: Path) -> dict[str, Any]:
    run = run_file(training=TRAINING, output=str(tmp_path / name))
    run["teacher"]["engine"] = {"name": "sglang"}
    return run


@pytest.fixture(scope="module")
def embedded(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with the teacher in the student's process."""
    output = tmp_path_factory.mktemp("sglang") / "embedded"
    train(make_run(tiny, training=TRAINING, output=str(output)))
    return output


def same_trajectory(one: Path, other: Path, rel: float = 1e-5) -> None:
    figures = [trajectory(output, ("loss", "grad_norm", "samples", "tokens")) for output in (one, other)]
    assert [step for step, *_ in figures[0]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(*figures, strict=True):
        assert ours[1:3] == pytest.approx(theirs[1:3], abs=1e-5, rel=rel)
        assert ours[3:] == theirs[3:]
    divergences = [[event["divergence"] for event in events(output, "eval")] for output in (one, other)]
    assert divergences[0] == pytest.approx(divergences[1], abs=1e-5)


def test_a_capture_by_sglang_gives_the_same_trajectory(run_file: RunFile, tmp_path: Path, embedded: Path) -> None:
    rows = str(tmp_path / "rows")
    run = run_file(training=TRAINING, output=str(tmp_path / "cached"))
    plan, progress = capture(run, output=rows, engine=Choice(name="sglang"))
    assert progress.samples == plan.samples > 0
    run["teacher"]["engine"] = {"name": "cache", "path": rows}
    kdflow.train(run)
    same_trajectory(Path(run["output"]), embedded)


@pytest.mark.parametrize("case", ["dskd", "every", "ema"])
def test_embeddings_and_new_weights_give_the_same_trajectory(
    case: str, run_file: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    made = run_file(training={"schedule": "constant", "warmup": 0})
    if case == "dskd":
        made |= {"algorithm": {"name": "dskd"}, "teacher": {"model": tiny["foreign"]}}
    else:
        made["algorithm"]["ce_weight"] = 0.5
        made["student"]["model"] = tiny["untied" if case == "every" else "student"]
        made["teacher"] = {"follow": {"every": 2} if case == "every" else {"ema": 0.5}}
    for name in ("transformers", "sglang"):
        made["teacher"]["engine"] = {"name": name}
        kdflow.train({**made, "output": str(tmp_path / name)})
    keys = ("loss", "grad_norm", "t2s_kd" if case == "dskd" else "kd")
    theirs, ours = (trajectory(tmp_path / name, keys) for name in ("transformers", "sglang"))
    assert len(theirs) == 4
    for expected, found in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)


def test_a_teacher_that_ranks_share_follows_the_student(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    made = run_file(algorithm={"ce_weight": 0.5}, student={"model": tiny["untied"]})
    made["teacher"] = {"follow": {"every": 1}}
    kdflow.train({**made, "output": str(tmp_path / "embedded")})
    made["teacher"]["engine"] = {"name": "sglang", "tensor_parallel": 2}
    train({**made, "output": str(tmp_path / "shared")}, "--nproc-per-node", "2")
    theirs, ours = (trajectory(tmp_path / name, ("loss", "kd")) for name in ("embedded", "shared"))
    for expected, found in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-3)


def restarts(output: Path) -> int:
    """Of the run's engines, as the last word has it, and as the steps tell."""
    total: int = json.loads((output / "summary.json").read_text(encoding="utf-8"))["engine_restarts"]
    assert total == sum(event["engine_restarts"] for event in events(output, "step"))
    return total


def only_engine(run: subprocess.Popen[str]) -> int:
    until(lambda: len(engines_of(run.pid)) == 1, "the engine")
    return engines_of(run.pid)[0]


def test_the_trajectory_is_that_of_the_embedded_teacher_also_if_the_engine_is_killed(
    run_file: RunFile, tmp_path: Path, embedded: Path, folder: Path
) -> None:
    run = on_sglang(run_file, "sglang", tmp_path)
    process = start(run, "-v")
    engine = only_engine(process)
    until(lambda: len(events(run["output"], "step")) >= 10, "step 10")
    (scheduler,), held = schedulers(engine), held_files(engine)
    os.kill(scheduler, signal.SIGKILL)
    until(lambda: gone(engine, held), "the end of the first engine")
    held = held_files(only_engine(process))
    printed = finish(process)
    assert "by shared_memory: 1 copies and 192 bytes a row" in printed
    assert "teacher.engine 'sglang' failed, 1 of at most 3 times" in printed
    (told,) = events(run["output"], "teacher")
    assert (told["transport"], told["copies_per_row"], told["bytes_per_row"]) == ("shared_memory", 1, 192)
    assert restarts(Path(run["output"])) == 1
    assert all(0 < event["teacher_parity"] < 1e-4 for event in events(run["output"], "step"))
    same_trajectory(Path(run["output"]), embedded)
    assert not any(Path(path).exists() for path in held)
    assert list(folder.glob("kdflow-sglang-*")) == []


def test_three_failures_in_a_row_end_the_run_with_a_checkpoint(
    run_file: RunFile, tmp_path: Path, embedded: Path
) -> None:
    run = on_sglang(run_file, "failing", tmp_path)
    run["training"] = {**run["training"], "checkpoint_every": None}
    process = start(run)
    until(lambda: len(events(run["output"], "step")) >= 3, "step 3")
    printed = killed_until_it_fails(process)
    assert "teacher.engine 'sglang' failed 3 times in a row" in printed
    assert "Traceback" not in printed.partition("kdflow")[0]
    assert f"Step {len(events(run['output'], 'step'))} is kept as a checkpoint: --resume auto goes on" in printed
    kdflow.train(run, resume="auto")
    same_trajectory(Path(run["output"]), embedded)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("folder", signal.SIGKILL),
        *itertools.product(("scheduler", "step"), (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)),
    ],
)
def test_a_run_that_is_ended_leaves_nothing(
    moment: str, number: signal.Signals, run_file: RunFile, tmp_path: Path, folder: Path
) -> None:
    """Also while its engine starts: with the first of what it makes, and while it waits for its scheduler."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
    run = on_sglang(run_file, "ended", tmp_path)
    run["training"]["steps"] = 100_000
    process = start(run)
    engine = only_engine(process)
    come: dict[str, Callable[[], object]] = {
        "folder": lambda: list(folder.glob("kdflow-sglang-*")),
        "scheduler": lambda: schedulers(engine) and held_files(engine),
        "step": lambda: events(run["output"], "step"),
    }
    until(lambda: bool(come[moment]()), f"the first {moment}")
    held = held_files(engine)
    assert held or moment == "folder"
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    until(lambda: gone(engine, held), "the end of the engine", 30)
    until(lambda: not list(folder.glob("kdflow-sglang-*")), "the end of its files", 30)


def test_ranks_share_an_engine_of_two_processes_that_works_beside_them(
    run_file: RunFile, tmp_path: Path, embedded: Path, folder: Path
) -> None:
    run = on_sglang(run_file, "shared", tmp_path)
    run["teacher"]["engine"] |= {"tensor_parallel": 2, "placement": "dedicated"}
    process = start(run, "--nproc-per-node", "2")
    until(lambda: len(events(run["output"], "step")) >= 10, "step 10")
    engines = engines_below(process.pid)
    assert len(engines) == 1
    shares, held = schedulers(engines[0]), held_files(engines[0])
    assert len(shares) == 2
    os.kill(shares[1], signal.SIGKILL)
    printed = finish(process)
    assert "teacher.engine 'sglang' failed, 1 of at most 3 times" in printed
    assert restarts(Path(run["output"])) == 1, "the leader's alone, on all ranks"
    # The two halves of a product are summed in another order.
    same_trajectory(Path(run["output"]), embedded, rel=1e-4)
    assert gone(engines[0], held)
    assert list(folder.glob("kdflow-sglang-*")) == []


def test_each_rank_may_have_engines_of_its_own(run_file: RunFile, tmp_path: Path) -> None:
    embedded, run = (run_file(output=str(tmp_path / name)) for name in ("embedded", "sglang"))
    train(embedded)
    run["teacher"]["engine"] = {"name": "sglang"}
    process = start(run, "--nproc-per-node", "2")
    until(lambda: len(engines_below(process.pid)) == 2 or process.poll() is not None, "two engines")
    finish(process)
    theirs, ours = (trajectory(one["output"], ("loss", "grad_norm")) for one in (embedded, run))
    assert len(theirs) == 4
    for expected, found in zip(theirs, ours, strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-4)
