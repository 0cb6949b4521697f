"""Configurations that must be equivalent follow one loss trajectory: real processes, real gloo."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml

import kdflow
from kdflow.contracts import KdflowError
from tests.support.commands import kdflow_process
from tests.support.distributions import plugin
from tests.support.runs import events, finish, interrupted, start, train, trajectory

RunFile = Callable[..., dict[str, Any]]
STEPS = 5


def _run(run_file: RunFile, tmp_path: Path, name: str, *, student: str, processes: int = 1,
         resume: Any = None, **sections: Any) -> Path:  # fmt: skip
    training = {"steps": STEPS, "tokens_per_step": 1000, **sections.pop("training", {})}
    run = run_file(output=str(tmp_path / name), student={"model": student}, training=training, **sections)
    if processes == 1:
        kdflow.train(run, resume=resume)
    else:
        train(run, "--nproc-per-node", str(processes))
    return tmp_path / name


def _assert_same(one: Path, other: Path, rtol: float = 2e-5) -> None:
    for key in ("samples", "learning_rate", "target_tokens", "tokens"):
        assert trajectory(one, [key]) == trajectory(other, [key])
    for key in ("loss", "grad_norm"):
        expected = [value for _, value in trajectory(one, [key])]
        assert len(expected) == STEPS
        assert [value for _, value in trajectory(other, [key])] == pytest.approx(expected, rel=rtol)


@pytest.mark.parametrize("student", ["student", "untied"])
def test_one_process_equals_two_ranks_and_other_micro_batches(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path, student: str
) -> None:
    algorithm = {"name": "jsd", "ce_weight": 0.2, "temperature": 1.5}
    shared: dict[str, Any] = {"student": tiny[student], "algorithm": algorithm}
    plain = _run(run_file, tmp_path, "plain", **shared)
    losses = [loss for _, loss in trajectory(plain, ["loss"])]
    assert losses[-1] < losses[0], "nothing was learnt: the comparison would mean nothing"

    two_ranks = _run(run_file, tmp_path, "two-ranks", processes=2, **shared)
    _assert_same(plain, two_ranks)
    # The held-out figures after training see every parameter.
    assert events(two_ranks, "eval")[-1]["divergence"] == pytest.approx(
        events(plain, "eval")[-1]["divergence"], rel=1e-4
    )

    if student == "untied":
        _assert_same(plain, _run(run_file, tmp_path, "four-ranks", processes=4, **shared))

    # 128 tokens fit one sample or two: three times the micro-batches, not a multiple of anything.
    data = {**run_file()["data"], "max_tokens": 128}
    _assert_same(plain, _run(run_file, tmp_path, "small", data=data, **shared))
    _assert_same(plain, _run(run_file, tmp_path, "small-two-ranks", data=data, processes=2, **shared))


def test_replicas_of_a_sharded_student_are_one_student(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    """Four ranks as two groups of two, and what they have saved in one process."""
    shared: dict[str, Any] = {"student": tiny["student"], "algorithm": {"name": "jsd"}}
    plain = _run(run_file, tmp_path, "plain", **shared)
    four = _run(run_file, tmp_path, "four", processes=4, training={"replicas": 2, "checkpoint_every": 3}, **shared)
    _assert_same(plain, four)
    # 128 tokens fit one sample or two: several micro-batches, between which replicas do not meet.
    data = {**run_file()["data"], "max_tokens": 128}
    for processes in (2, 4):
        small = _run(run_file, tmp_path, f"small-{processes}", data=data, processes=processes,
                     training={"replicas": 2}, **shared)  # fmt: skip
        _assert_same(plain, small)
    checkpoint = dcp.FileSystemReader(four / "checkpoints" / "step-00000003")
    entries = checkpoint.read_metadata().state_dict_metadata
    assert {len(entry.chunks) for name, entry in entries.items() if name.startswith("student.")} == {2}
    interrupted(four, tmp_path / "alone", step=3)
    _assert_same(plain, _run(run_file, tmp_path, "alone", resume="auto", **shared))


def test_replicas_that_do_not_divide_the_ranks_are_refused(run_file: RunFile) -> None:
    with pytest.raises(KdflowError, match=r"training.replicas: 2 groups cannot divide 1 ranks evenly"):
        kdflow.train(run_file(training={"replicas": 2}))
    assert not dist.is_initialized(), "the next run of this process begins afresh"


@pytest.mark.parametrize(
    "training",
    [{"head_chunk": 7}, {"head_chunk": 100_000}, {"activation_checkpointing": True}],
    ids=["chunks of 7 rows", "one chunk", "activation checkpointing"],
)
def test_what_saves_memory_changes_nothing(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path, training: dict[str, Any]
) -> None:
    plain = _run(run_file, tmp_path, "plain", student=tiny["student"])
    _assert_same(plain, _run(run_file, tmp_path, "other", student=tiny["student"], training=training))


def test_a_rank_without_samples_stays_in_step(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    """One sample a step: the second rank only ever runs fillers."""
    shared: dict[str, Any] = {"student": tiny["student"], "training": {"tokens_per_step": 1}}
    plain = _run(run_file, tmp_path, "plain", **shared)
    _assert_same(plain, _run(run_file, tmp_path, "two-ranks", processes=2, **shared))


def test_compiled_blocks_follow_the_same_trajectory(tiny: dict[str, str], run_file: RunFile, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"student": tiny["student"], "teacher": None, "algorithm": {"name": "sft"}}
    plain = _run(run_file, tmp_path, "plain", **shared)
    _assert_same(plain, _run(run_file, tmp_path, "compiled", training={"compile": True}, **shared), rtol=1e-4)


def test_sft_on_two_ranks(
    tiny: dict[str, str], run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, Any] = {"student": tiny["student"], "teacher": None, "algorithm": {"name": "sft"}}
    plain = _run(run_file, tmp_path, "plain", **shared)
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    _assert_same(plain, _run(run_file, tmp_path, "two-ranks", processes=2, **shared))
    assert events(plain, "eval")[0]["divergence"] is None
    assert not list(temporary.iterdir()), "the launcher leaves nothing behind"


def test_a_fault_of_rank_0_ends_every_rank(run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "file").touch()
    run = run_file(output=str(tmp_path / "file" / "run"))
    printed = finish(start(run, "--nproc-per-node", "2", directory=tmp_path), code=2)
    assert printed.count("cannot be written to") == 1, "told once, not by every rank"
    assert "Traceback" not in printed
    assert not list(temporary.iterdir()), "the launcher leaves nothing behind"


def test_ranks_that_are_interrupted_say_it_once(run_file: RunFile, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
    process = start(run_file(output=str(tmp_path / "run"), training={"steps": 100000}), "--nproc-per-node", "2")
    while len(events(tmp_path / "run", "step")) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed = finish(process, code=128 + signal.SIGINT)
    told = "error: interrupted by SIGINT: --resume auto goes on from the last checkpoint, if there is one"
    assert printed.splitlines() == [told]


@pytest.mark.parametrize(("number", "ended"), [(signal.SIGKILL, "killed"), (signal.SIGINT, "interrupted")])
def test_a_rank_that_ends_ends_the_run_and_is_named(
    run_file: RunFile, tmp_path: Path, number: signal.Signals, ended: str
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run = run_file(output=str(tmp_path / "run"), training={"steps": 100000})
    process = start(run, "--nproc-per-node", "2")
    while len(events(tmp_path / "run", "step")) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    rank = next(int(pid) for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(rank, number)
    printed = finish(process, code=128 + number)
    told = f"error: rank 1 was {ended} by {number.name}; go on with --resume auto"
    assert printed.splitlines() == [told], "and nothing of the other, which only lost it"


NAMED = """
import os

import kdflow
import torch
from kdflow.contracts import LossSum

class Named(kdflow.Algorithm):
    name = "named"
    needs = frozenset()
    class Options(kdflow.Options):
        names: list[list[str]]
    def loss(self, student, teacher, batch):
        value = {"a": 1.0, "b": 20.0}
        names = self.options.names[int(os.environ["RANK"])]
        return LossSum(student.rows.square().sum(), {name: (torch.tensor(value[name]), 1.0) for name in names})

@kdflow.hookimpl
def kdflow_algorithms():
    return [Named]
"""


@pytest.mark.parametrize("second", [["b", "a"], ["a"]], ids=["another order", "other names"])
def test_ranks_add_metrics_up_by_their_names(run_file: RunFile, tmp_path: Path, second: list[str]) -> None:
    plugin("kdflow_named", NAMED).install(tmp_path)
    algorithm = {"name": "named", "names": [["a", "b"], second]}
    run = {**run_file(algorithm=algorithm, training={"steps": 2}), "teacher": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    ended = kdflow_process("train", tmp_path / "run.yaml", "--nproc-per-node", "2", path=[tmp_path])
    if second == ["a"]:
        assert ended.code == 2
        assert ended.err.count("error: algorithm 'named': its metric 'b' is there in some micro-batches") == 1
    else:
        assert trajectory(tmp_path / "run", ["a", "b"]) == [(1, 1.0, 20.0), (2, 1.0, 20.0)], ended.err
