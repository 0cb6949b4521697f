"""A teacher that works beside the student."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

import kdflow
from kdflow.contracts import EngineContext, Head, KdflowError, Lease, ModelSpec, TokenBatch
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.runtime import student as student_module
from kdflow.runtime.loop import Loop
from kdflow.runtime.phases import Phases
from kdflow.runtime.student import Student
from kdflow.runtime.teacher import Teacher, require_sizes
from kdflow.tokenizers.huggingface import from_transformers
from kdflow.tokenizers.vocabulary import vocabulary_size
from tests.engines.test_transformers import make_batch
from tests.support.models import make_tokenizer
from tests.support.runs import events, interrupted, trajectory

RunFile = Callable[..., dict[str, Any]]


class Overlapping(TransformersTeacher):
    """One that may be asked from another thread; it tells what it was asked, and can be held up."""

    overlaps = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self.arrived = threading.Semaphore(0)

    def score(self, batch: TokenBatch) -> Lease:
        self.asked.append(batch.digest)
        self.threads.add(threading.current_thread().name)
        self.arrived.release()
        return super().score(batch)


@pytest.fixture
def teacher(tiny: dict[str, str]) -> Teacher:
    context = EngineContext(torch.device("cpu"), torch.float32)
    return Teacher(Overlapping(tiny["teacher"], kdflow.Options(), context), valid_vocab=384)


def test_a_teacher_whose_head_is_one_shard_of_it_is_refused(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TransformersTeacher.head.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(TransformersTeacher, "head", property(lambda self: Head(whole(self).weight[:192])))
    with pytest.raises(
        KdflowError, match="'transformers': the head has 192 rows, but the teacher's tokens go up to id 383"
    ):
        kdflow.train(run_file())


@pytest.mark.parametrize(
    ("name", "told", "message"),
    [
        ("spec", ModelSpec(7, 392), r"hidden_size 7, but the head's weight is \[392, 48\]"),
        ("spec", ModelSpec(48, 9), r"spec has vocab_size 9 and .* \[392, 48\]"),
        ("spec", None, r"spec must be a kdflow\.contracts\.ModelSpec, not a NoneType"),
        ("head", torch.zeros(392, 48), r"head must be a kdflow\.contracts\.Head, not a Tensor"),
    ],
)
def test_a_spec_that_contradicts_the_head_is_refused(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, name: str, told: Any, message: str
) -> None:
    monkeypatch.setattr(Overlapping, name, told)
    with pytest.raises(KdflowError, match=f"teacher engine 'transformers': .*{message}"):
        require_sizes(teacher.engine, from_transformers(make_tokenizer()))


def test_a_head_may_lack_the_rows_of_added_tokens(teacher: Teacher) -> None:
    """As Gemma 3's does, whose tokenizer knows images."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<image {number}>", special=True) for number in range(9)])
    assert vocabulary_size(tokenizer) == teacher.engine.head.vocab_size + 1
    require_sizes(teacher.engine, from_transformers(tokenizer))


def test_one_micro_batch_is_scored_ahead_and_no_more(teacher: Teacher) -> None:
    batches = [make_batch(seed) for seed in range(4)]
    digests = [batch.teacher.digest for batch in batches if batch.teacher]
    engine: Any = teacher.engine
    scored = teacher.each(batches)
    for number in range(4):
        assert engine.arrived.acquire(timeout=60), "it begins before it is asked for"
        assert engine.asked == digests[: number + 1], "one ahead, no more"
        lease, side = next(scored)
        assert lease.digest == side.tokens.digest == digests[number]
        lease.release()
    assert next(scored, None) is None
    assert all(name.startswith("kdflow-teacher") for name in engine.threads)
    assert list(teacher.each([])) == []
    teacher.close()


def test_who_asks_in_between_is_answered(teacher: Teacher) -> None:
    batches = [make_batch(seed) for seed in range(3)]
    scored = teacher.each(batches[:2])
    _, side = teacher.score(batches[2])
    assert batches[2].teacher is not None
    assert side.tokens.digest == batches[2].teacher.digest
    assert [lease.digest for lease, _ in scored] == [batch.teacher.digest for batch in batches[:2] if batch.teacher]
    teacher.close()


def test_an_engine_that_takes_several_is_given_them_together(tiny: dict[str, str]) -> None:
    class Together(TransformersTeacher):
        at_once = 3

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.asked: list[int] = []
            self.room, self.arrived = threading.Semaphore(self.at_once), threading.Semaphore(0)

        def score_all(self, batches: Sequence[TokenBatch]) -> list[Lease]:
            self.arrived.release()
            for _ in range(self.at_once):
                assert self.room.acquire(timeout=60)
            self.asked.append(len(batches))
            for _ in range(self.at_once - len(batches)):
                self.room.release()
            return [Lease(lease.rows, lease.digest, self.room.release) for lease in super().score_all(batches)]

    engine = Together(tiny["teacher"], kdflow.Options(), EngineContext(torch.device("cpu"), torch.float32))
    teacher, batches = Teacher(engine, valid_vocab=384), [make_batch(seed) for seed in range(5)]
    scored = teacher.each(batches)
    assert engine.arrived.acquire(timeout=60), "it begins before it is asked for"
    for number, batch in enumerate(batches):
        lease, side = next(scored)
        if number == 0:
            assert engine.arrived.acquire(timeout=60), "the next are asked for before these are learnt from"
        assert engine.asked == ([3] if number < 3 else [3, 2])
        assert batch.teacher is not None
        assert lease.digest == side.tokens.digest == batch.teacher.digest
        assert torch.equal(lease.rows, TransformersTeacher.score(engine, batch.teacher).rows)
        lease.release()
    assert next(scored, None) is None
    assert teacher.beside
    assert not teacher.queues, "the host waits for it"
    teacher.close()


def test_the_students_own_pass_does_not_wait_for_a_teacher_beside_it(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the device would wait for the host after each wait for the teacher."""
    score, forward = TransformersTeacher.score, student_module.packed_hidden_states
    begun, told = threading.Semaphore(0), list[str]()

    def scores(self: TransformersTeacher, batch: TokenBatch) -> Lease:
        assert threading.current_thread() is threading.main_thread() or begun.acquire(timeout=60)
        told.append("teacher")
        return score(self, batch)

    def computes(*arguments: Any) -> torch.Tensor:
        told.append("student")
        begun.release()
        return forward(*arguments)

    monkeypatch.setattr(TransformersTeacher, "score", scores)
    monkeypatch.setattr(student_module, "packed_hidden_states", computes)
    monkeypatch.setattr(Loop, "evaluate", lambda self, step: None)
    made = run_file(data={"max_tokens": 512}, training={"steps": 2})
    kdflow.train({**made, "output": str(tmp_path / "after")})
    assert told[:2] == ["teacher", "student"], "in one process the teacher's memory is free again before"
    told.clear()
    while begun.acquire(blocking=False):
        pass
    monkeypatch.setattr(TransformersTeacher, "overlaps", True)
    kdflow.train({**made, "output": str(tmp_path / "beside")})
    assert told[:2] == ["student", "teacher"]
    assert trajectory(tmp_path / "beside") == trajectory(tmp_path / "after")


def test_an_engine_that_overlaps_is_given_micro_batches_one_by_one(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overlapping, "at_once", 3)
    given, score_all = list[int](), teacher.engine.score_all
    monkeypatch.setattr(teacher.engine, "score_all", lambda batches: given.append(len(batches)) or score_all(batches))
    for lease, _ in teacher.each([make_batch(seed) for seed in range(5)]):
        lease.release()
    assert given == [1] * 5
    assert not teacher.in_turns, "an evaluation in between finds room"
    teacher.close()


@pytest.mark.parametrize("fault", ["one is missing", "rows are missing", "two are exchanged"])
def test_what_is_lent_wrongly_is_given_back(teacher: Teacher, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    engine: Any = teacher.engine
    released: list[int] = []

    def wrong(batches: Sequence[TokenBatch]) -> list[Lease]:
        leases = [Lease(engine.score(batch).rows, batch.digest, lambda: released.append(1)) for batch in batches]
        if fault == "one is missing":
            return leases[1:]
        if fault == "rows are missing":
            leases[0].rows = leases[0].rows[1:]
            return leases
        return leases[::-1]

    monkeypatch.setattr(engine, "score_all", wrong)
    with pytest.raises(KdflowError, match="returned rows of other tokens than it was sent"):
        teacher._score_all([make_batch(seed) for seed in range(3)])
    assert len(released) == (2 if fault == "one is missing" else 3)
    teacher.close()


def test_phases_within_a_phase_are_no_part_of_it() -> None:
    phases = Phases(("outer", "inner"))
    started = time.perf_counter()
    with phases("outer"):
        for _ in range(2):
            with phases("inner"):
                time.sleep(0.05)
                with phases("outer"):
                    time.sleep(0.02)
        time.sleep(0.03)
    whole = time.perf_counter() - started
    assert sum(phases.seconds.values()) == pytest.approx(whole, abs=1e-3)
    assert 0.1 <= phases.seconds["inner"] <= whole - 0.07
    with phases("inner"):
        pass
    assert sum(phases.seconds.values()) == pytest.approx(whole, abs=1e-3)


def test_a_fault_ahead_is_told_when_its_turn_comes(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = teacher.engine
    score = engine.score
    monkeypatch.setattr(engine, "score", lambda batch: Lease(score(batch).rows[1:], batch.digest))
    scored = teacher.each([make_batch()])
    with pytest.raises(KdflowError, match="rows of other tokens"):
        next(scored)
    teacher.close()


@pytest.mark.parametrize("engine", ["overlaps", "takes turns"])
def test_a_run_beside_which_the_teacher_works_is_the_same(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    made = run_file(data={"max_tokens": 128}, training={"steps": 6, "evaluate_every": 2, "checkpoint_every": 3})
    kdflow.train({**made, "output": str(tmp_path / "plain")})
    score, room = TransformersTeacher.score, threading.Semaphore(2)

    def lends(self: TransformersTeacher, batch: TokenBatch) -> Lease:
        assert room.acquire(timeout=30), "what evaluates waits for rows that nobody gives back"
        lease = score(self, batch)
        return Lease(lease.rows, lease.digest, room.release)

    if engine == "overlaps":
        monkeypatch.setattr(TransformersTeacher, "overlaps", True)
    else:
        monkeypatch.setattr(TransformersTeacher, "at_once", 2)
        monkeypatch.setattr(TransformersTeacher, "score", lends)
    threads = threading.active_count()
    kdflow.train({**made, "output": str(tmp_path / "beside")})
    assert trajectory(tmp_path / "beside") == trajectory(tmp_path / "plain")
    figures = [[event["divergence"] for event in events(tmp_path / name, "eval")] for name in ("plain", "beside")]
    assert figures[0] == figures[1]
    assert threading.active_count() == threads


def test_the_next_step_is_being_scored_while_the_last_micro_batch_is_learnt(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a teacher with a GPU of its own would wait for the student at the end of every step."""
    score, backward = TransformersTeacher.score, Student.backward
    asked, learnt, ahead = threading.Semaphore(0), [0], [0]

    def scores(self: TransformersTeacher, batch: TokenBatch) -> Lease:
        asked.release()
        return score(self, batch)

    def learns(self: Student, batch: Any, teacher: Any, tokens: int, last: bool, *rest: Any) -> Any:
        wanted, ahead[0] = 1 - ahead[0], int(last and learnt[0] < 3)
        learnt[0] += last
        for _ in range(wanted + ahead[0]):
            assert asked.acquire(timeout=60)
        return backward(self, batch, teacher, tokens, last, *rest)

    monkeypatch.setattr(TransformersTeacher, "overlaps", True)
    monkeypatch.setattr(TransformersTeacher, "score", scores)
    monkeypatch.setattr(Student, "backward", learns)
    monkeypatch.setattr(Loop, "evaluate", lambda self, step: None)
    kdflow.train({**run_file(data={"max_tokens": 128}, training={"steps": 4}), "output": str(tmp_path / "run")})
    assert learnt == [4]


def test_restarts_of_engines_are_counted_where_they_happen(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each evaluation, before the first step and after the last, and two in the second step."""
    count, evaluate, clip = 0, Loop.evaluate, Student.clip

    def restart(times: int) -> None:
        nonlocal count
        count += times

    def evaluates(self: Loop, step: int) -> None:
        restart(1)
        evaluate(self, step)

    def clips(self: Student) -> torch.Tensor:
        restart(2 * (len(events(output, "step")) == 1))
        return clip(self)

    monkeypatch.setattr(TransformersTeacher, "restarts", property(lambda self: count))
    monkeypatch.setattr(Loop, "evaluate", evaluates)
    monkeypatch.setattr(Student, "clip", clips)
    made = run_file(training={"checkpoint_every": 1, "keep_checkpoints": 9})
    output = whole = tmp_path / "whole"
    kdflow.train({**made, "output": str(whole)})
    assert [event["engine_restarts"] for event in events(whole, "step")] == [1, 2, 0, 0]
    assert json.loads((whole / "summary.json").read_text())["engine_restarts"] == 4
    count, output = 0, interrupted(whole, tmp_path / "resumed", 3)
    kdflow.train({**made, "output": str(output)}, resume="auto")
    assert [event["engine_restarts"] for event in events(output, "step")] == [1, 2, 0, 0]
    assert json.loads((output / "summary.json").read_text())["engine_restarts"] == 4
