"""What the loop promises of a single run."""

from __future__ import annotations

import gc
import json
import pickle
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import kdflow
from kdflow.config import TrainingConfig
from kdflow.contracts import KdflowError, LossSum, TrainingStopped
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.ops.kd import DivergenceAlgorithm
from kdflow.runtime import checkpoint as checkpoint_module
from kdflow.runtime import export as export_module
from kdflow.runtime import run_directory
from kdflow.runtime.checkpoint import RUN_STATE, Checkpoints, load_tensors, write_manifest
from kdflow.runtime.export import export
from kdflow.runtime.held_out import HeldOut
from kdflow.runtime.loop import Loop
from kdflow.runtime.optimizer import schedule
from kdflow.runtime.processes import Processes
from kdflow.runtime.student import Root, Student
from kdflow.runtime.teacher import Teacher
from kdflow.runtime.trackers import ConsoleTracker
from tests.support.commands import site
from tests.support.distributions import plugin
from tests.support.models import write_jsonl
from tests.support.runs import events, finish, interrupted, saved, start, trajectory

__all__ = ["site"]

RunFile = Callable[..., dict[str, Any]]


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(run_file: RunFile, tmp_path: Path) -> None:
    training = {"steps": 5, "learning_rate": 1e30, "clip_norm": None, "schedule": "constant", "tokens_per_step": 100}
    with pytest.raises(TrainingStopped, match=r"step \d: .* is not finite") as stopped:
        kdflow.train(run_file(training={**run_file()["training"], **training}))
    assert "train.jsonl:" in str(stopped.value)
    assert stopped.value.exit_code == 1
    warning = events(tmp_path / "run", "warning")[0]
    assert warning["sample_ids"]
    assert warning["step"] == len(events(tmp_path / "run", "step")) + 1, "the step that failed left no line"


def test_a_run_that_has_ended_holds_no_weights(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = list[weakref.ref[torch.nn.Module]](), Root.__init__

    def noted(self: Root, *arguments: Any) -> None:
        build(self, *arguments)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Root, "__init__", noted)
    thresholds = gc.get_threshold()
    gc.set_threshold(0)  # else they might be freed by chance
    try:
        kdflow.train(run_file(training={"steps": 2}))
        held = [one() for one in made]
    finally:
        gc.set_threshold(*thresholds)
    assert held == [None]


@pytest.mark.parametrize(
    "owner",
    [Loop, Student, DivergenceAlgorithm],
    ids=["after all micro-batches", "after the first", "while the student is computed with"],
)
def test_an_error_keeps_the_last_whole_step(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type
) -> None:
    run = run_file(training={"steps": 6, "tokens_per_step": 1000, "dtype": "bfloat16"})  # parameters are in float32
    kdflow.train({**run, "output": str(tmp_path / "whole")})
    name = {Loop: "require_finite", Student: "backward", DivergenceAlgorithm: "loss"}[owner]
    works, calls = getattr(owner, name), list[int]()

    def stops(self: Any, *arguments: Any) -> Any:
        calls.append(len(events(tmp_path / "run", "step")))
        if calls.count(3) == (1 if owner is Loop else 2):
            raise KdflowError("nothing works")
        return works(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stops)
        with pytest.raises(KdflowError) as stopped:
            kdflow.train(run)
    assert str(stopped.value).endswith("Step 3 is kept as a checkpoint: --resume auto goes on from there.")
    kdflow.train(run, resume="auto")
    assert [event["step"] for event in events(tmp_path / "run", "resumed")] == [3]
    assert trajectory(tmp_path / "run") == trajectory(tmp_path / "whole")


@pytest.mark.parametrize(
    ("owner", "method", "message"),
    [
        (DivergenceAlgorithm, "build", "algorithm 'forward_kl': build must return"),
        (DivergenceAlgorithm, "prepare", "algorithm 'forward_kl': prepare must return"),
        (DivergenceAlgorithm, "loss", "algorithm 'forward_kl': loss must return"),
        (TransformersTeacher, "score", "teacher engine 'transformers': score must return"),
    ],
)
def test_what_a_plugin_returns_is_looked_at(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, message: str
) -> None:
    monkeypatch.setattr(owner, method, lambda *_: 5)
    with pytest.raises(KdflowError, match=f"{message} .*, but returned 5\\b"):
        kdflow.train(run_file(data={"eval": []}))


def test_an_error_says_where_nothing_is_kept(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step there is nothing; and once the optimizer has moved, the student is of no whole step."""

    def fails(*_: Any) -> None:
        raise KdflowError("nothing works")

    monkeypatch.setattr(Loop, "require_finite", fails)
    with pytest.raises(KdflowError, match="nothing works\nThere is no checkpoint yet"):
        kdflow.train(run_file())
    monkeypatch.undo()
    run, move = run_file(output=str(tmp_path / "moved"), training={"checkpoint_every": 2}), Student.step

    def moves(self: Student, *arguments: Any) -> None:
        move(self, *arguments)
        if len(events(tmp_path / "moved", "step")) == 3:
            fails()

    monkeypatch.setattr(Student, "step", moves)
    with pytest.raises(KdflowError, match="nothing works\nThe last checkpoint stands: --resume auto"):
        kdflow.train(run)
    assert sorted(path.name for path in (tmp_path / "moved" / "checkpoints").glob("step-*")) == ["step-00000002"]


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_run_that_was_ended_before_its_first_step_starts_again(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: Any
) -> None:
    def fails(*_: Any) -> None:
        raise KdflowError("nothing works")

    run = run_file(tracking=[], training={"steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", fails)
        with pytest.raises(KdflowError, match="nothing works"):
            kdflow.train(run)
    assert (tmp_path / "run" / "run.yaml").exists()
    assert kdflow.train(run, resume=resume).steps == 1


def test_a_run_that_goes_on_has_no_last_word_yet(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        assert not (tmp_path / "run" / "summary.json").exists()
        raise KdflowError("nothing works")

    run = run_file(tracking=[], training={"steps": 1})
    kdflow.train(run)
    kdflow.train(run, resume="auto")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    monkeypatch.setattr(Loop, "require_finite", fails)
    with pytest.raises(KdflowError, match="nothing works"):
        kdflow.train(run, ["training.steps=2"], resume="auto")


@pytest.mark.parametrize("stopped", ["by an error", "with fewer steps", "with fewer steps than were taken"])
def test_the_last_evaluation_is_made_up_for(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    training = {"checkpoint_every": 2, "evaluate_every": 1, "schedule": "constant", "warmup": 0}
    run, works = run_file(training=training), HeldOut.evaluate
    kdflow.train({**run, "output": str(tmp_path / "whole")})
    expected = events(tmp_path / "whole", "eval")

    def fails(*arguments: Any) -> Any:
        if len(events(tmp_path / "run", "step")) == 4:
            raise KdflowError("nothing works")
        return works(*arguments)

    step, run["training"]["evaluate_every"] = 4, 3
    if stopped == "by an error":
        with monkeypatch.context() as patch:
            patch.setattr(HeldOut, "evaluate", fails)
            with pytest.raises(KdflowError, match="nothing works\nStep 4 is kept"):
                kdflow.train(run)
    else:
        kdflow.train(run, ["training.steps=5"])
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000005")
        run["training"]["steps"] = 4 if stopped == "with fewer steps" else 2
    for _ in range(2):  # the second time, no checkpoint holds the evaluation either: it is told once
        result = kdflow.train(run, resume="auto")
        assert [event["step"] for event in events(tmp_path / "run", "eval")] == [0, 3, step]
        assert [event["step"] for event in events(tmp_path / "run", "sample")] == [0, step]
        after = {"event": "eval", "step": step, **result.evaluation["after"]}
        assert after == events(tmp_path / "run", "eval")[-1] == expected[step]
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["evaluation"] == result.evaluation


def test_a_checkpoint_that_does_not_tell_what_was_evaluated_is_gone_on_from(run_file: RunFile, tmp_path: Path) -> None:
    run = run_file()
    kdflow.train(run)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    state = json.loads((checkpoint / RUN_STATE).read_text())
    del state["evaluated"]
    (checkpoint / RUN_STATE).write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    before = events(tmp_path / "run", "eval")
    kdflow.train(run, resume="auto")
    assert events(tmp_path / "run", "eval") == before
    assert kdflow.train(run, ["training.steps=5"], resume="auto").steps == 5


def test_time_and_memory_of_a_run_are_also_those_before_a_resume(run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file())
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    state = json.loads((checkpoint / RUN_STATE).read_text())
    assert state["wall_seconds"] >= state["seconds"]
    assert state["peak_memory_bytes"] > 0
    state |= {"wall_seconds": 1e6, "peak_memory_bytes": 2**60}  # of a process that took long
    (checkpoint / RUN_STATE).write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    kdflow.train(run_file(), ["training.steps=5"], resume="auto")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["wall_seconds"] > 1e6
    assert summary["peak_memory_bytes"] == 2**60


def test_one_process_at_a_time_trains_in_a_directory(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "_PATIENCE", 0.1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
    run = run_file(training={"steps": 100000, "checkpoint_every": 10})
    process = start(run)
    while len(events(tmp_path / "run", "step")) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    with pytest.raises(KdflowError, match=r"another process trains in .*run: wait for its end"):
        kdflow.train(run, resume="auto")
    process.send_signal(signal.SIGINT)
    assert "interrupted: --resume auto goes on from the last checkpoint" in finish(process, code=130)


def test_a_run_that_is_over_stays_described_as_it_was(run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file())
    before = (tmp_path / "run" / "run.yaml").read_text()
    kdflow.train(run_file(), ["training.learning_rate=0.5"], resume="auto")
    assert (tmp_path / "run" / "run.yaml").read_text() == before


def test_where_no_checkpoint_is_whole_nothing_starts_afresh(run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file())
    for file in (tmp_path / "run" / "checkpoints").glob("step-*/*.distcp"):
        file.write_bytes(b"")
    told = r"(?s)is damaged .*there is none before it.*no checkpoint in .* is whole: to start afresh, delete"
    with pytest.raises(KdflowError, match=told):
        kdflow.train(run_file(), resume="auto")


def test_a_resume_with_another_student_says_so_in_a_sentence(run_file: RunFile, tiny: dict[str, str]) -> None:
    kdflow.train(run_file())
    other = run_file(student={"model": tiny["teacher"]}, training={"steps": 9})
    with pytest.raises(KdflowError, match=r"does not fit the student of this run: Size mismatch .* back as") as told:
        kdflow.train(other, resume="auto")
    assert "\n" not in str(told.value)


def test_a_resume_with_other_layers_is_refused(run_file: RunFile, tiny: dict[str, str]) -> None:
    """They would be loaded where they do not belong: those of the checkpoint are numbered from 0."""
    run = run_file(student={"model": tiny["teacher"], "keep_layers": [0, 1]})
    kdflow.train(run)
    for layers in ([0, 2], [1], None):
        other = run_file(student={"model": tiny["teacher"], "keep_layers": layers}, training={"steps": 9})
        told = rf"student.keep_layers was \[0, 1\] and is {re.escape(repr(layers))}: .* give it back as it was, or"
        with pytest.raises(KdflowError, match=told):
            kdflow.train(other, resume="auto")
    assert kdflow.train(run, ["training.steps=5"], resume="auto").steps == 5


@pytest.mark.parametrize("name", ["loss", "rollout_gap", "aligned_unmatched"])
def test_metrics_have_names_of_their_own(run_file: RunFile, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def loss(*_: Any) -> LossSum:
        return LossSum(torch.zeros((), requires_grad=True), {name: (torch.ones(()), 1.0)})

    monkeypatch.setattr(DivergenceAlgorithm, "loss", loss)
    with pytest.raises(KdflowError, match=f"'forward_kl': its metrics {name} have names of a step's own figures"):
        kdflow.train(run_file())


def test_a_metric_is_divided_by_its_count_also_below_one(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = DivergenceAlgorithm.loss

    def loss(*arguments: Any) -> LossSum:
        metrics = {"weighted": (torch.tensor(5e-4), 1e-4), "of_none": (torch.tensor(0.0), 0)}
        return LossSum(works(*arguments).value, metrics)

    monkeypatch.setattr(DivergenceAlgorithm, "loss", loss)
    kdflow.train(run_file())
    for event in events(tmp_path / "run", "step"):
        assert (event["weighted"], event["of_none"]) == (pytest.approx(5.0), 0.0)


def test_no_held_out_sample_that_can_be_used_says_why(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"words": "none"}\n')
    data = {"train": [{"path": tiny["train"], "format": "text"}], "on_error": "skip",
            "eval": [{"path": str(tmp_path / "bad.jsonl"), "format": "text"}]}  # fmt: skip
    with pytest.raises(
        KdflowError, match=r"data.eval: none of the 1 records can be used \(.*bad.jsonl:1: the field 'text' is missing"
    ):
        kdflow.train(run_file(data=data))


def test_epochs_that_are_over_have_no_further_step(run_file: RunFile) -> None:
    training = {"epochs": 1, "steps": None}
    kdflow.train(run_file(training={**training, "tokens_per_step": 1000}))
    with pytest.raises(KdflowError, match=r"tokens_per_step was 1000 and is 200: how many steps training.epochs takes"):
        kdflow.train(run_file(training={**training, "tokens_per_step": 200}), resume="auto")


def test_epochs_of_data_that_has_become_less_are_over(run_file: RunFile, tmp_path: Path) -> None:
    short, long = ({"text": "a " * count} for count in (10, 60))
    source = [{"path": str(tmp_path / "data.jsonl"), "format": "text"}]
    run = run_file(data={"train": source}, training={"epochs": 1, "tokens_per_step": 40, "steps": 6})
    write_jsonl(tmp_path / "data.jsonl", [short] * 60)
    kdflow.train(run)
    write_jsonl(tmp_path / "data.jsonl", [long] * 12)
    with pytest.raises(KdflowError, match=r"training.epochs are over. The run was begun"):
        kdflow.train(run, ["training.steps=null"], resume="auto")


def test_epochs_of_which_nothing_is_learnt_are_refused(run_file: RunFile, tmp_path: Path) -> None:
    source = [{"path": write_jsonl(tmp_path / "data.jsonl", [{"text": "a " * 60}] * 30 + [{"text": "a"}])} | {
        "format": "text"}]  # fmt: skip
    data = {"train": source, "max_length": 20, "too_long": "drop"}
    training = {"epochs": 0.1, "steps": None}
    with pytest.raises(KdflowError, match=r"training.epochs: the 3 samples that 0.1 epochs draw hold no trainable"):
        kdflow.train(run_file(data=data, training=training))


def test_a_checkpoint_that_is_written_is_kept_beside_a_later_one_that_is_damaged(
    run_file: RunFile, tmp_path: Path
) -> None:
    run, checkpoints = run_file(training={"checkpoint_every": 2, "steps": 6}), tmp_path / "run" / "checkpoints"
    kdflow.train(run)
    next((checkpoints / "step-00000006").glob("*.distcp")).write_bytes(b"")
    kdflow.train(run, ["training.steps=5", "training.keep_checkpoints=1"], resume="auto")
    assert [one.name for one in sorted(checkpoints.glob("step-*"))] == ["step-00000005"]
    assert (checkpoints / "latest").resolve().name == "step-00000005"


@pytest.mark.parametrize("name", ["step-best", "step-00000009-keep", ".step-best"])
@pytest.mark.parametrize("is_file", [False, True], ids=["folder", "file"])
def test_what_a_user_puts_beside_checkpoints_is_none(
    run_file: RunFile, tmp_path: Path, name: str, is_file: bool
) -> None:
    beside = tmp_path / "run" / "checkpoints" / name
    beside.parent.mkdir(parents=True)
    if is_file:
        beside.write_text("mine")
    run = run_file(training={"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 1})
    kdflow.train(run)  # whose first checkpoint is deleted
    if not is_file:
        shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000004", beside)
        (beside / "manifest.json").unlink()
    kdflow.train(run, ["training.steps=6"], resume="auto")
    assert events(tmp_path / "run", "warning")[1:] == [], "it was not tried"
    assert beside.exists()
    assert export(tmp_path / "run", tmp_path / "exported").name == "step-00000006"


def test_leftovers_of_a_write_are_deleted(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002").mkdir()
    with Processes() as processes:
        Checkpoints(tmp_path, 2, processes)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_told_also_where_an_earlier_checkpoint_could_not_be_written(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    def stops(self: Loop, step: int, *_: Any) -> None:
        if step == 3:
            raise KdflowError("nothing works")

    monkeypatch.setattr(checkpoint_module, "save", fails)
    monkeypatch.setattr(Loop, "require_finite", stops)
    with pytest.raises(KdflowError) as stopped:
        kdflow.train(run_file(training={"checkpoint_every": 2}))
    first, second, third = str(stopped.value).splitlines()
    assert first == "nothing works"
    assert re.search(r"checkpoints: the checkpoint could not be written, where [\d.]+ GiB are free: no space$", second)
    assert third == "There is no checkpoint yet."


def _fills_the_disk(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Have the write of a checkpoint fail half-way, counted from 1; the others work."""
    works, writes = checkpoint_module.save, list[int]()

    def fails(*arguments: Any, storage_writer: Any, **named: Any) -> None:
        works(*arguments, storage_writer=storage_writer, **named)
        writes.append(1)
        if len(writes) == failing:
            raise OSError("no space")

    monkeypatch.setattr(checkpoint_module, "save", fails)


@pytest.mark.parametrize("stops", [None, 6], ids=["at the next checkpoint", "before the next checkpoint"])
def test_a_step_is_kept_although_the_checkpoint_before_could_not_be_written(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: int | None
) -> None:
    def fails(self: Loop, step: int, *_: Any) -> None:
        if step == stops:
            raise KdflowError("nothing works")

    _fills_the_disk(monkeypatch, 2 if stops is None else 1)
    monkeypatch.setattr(Loop, "require_finite", fails)
    with pytest.raises(KdflowError) as stopped:
        kdflow.train(run_file(training={"checkpoint_every": 2 if stops is None else 4, "steps": 8}))
    kept = {None: 6, 6: 5}[stops]
    assert "no space" in str(stopped.value)
    assert str(stopped.value).endswith(f"Step {kept} is kept as a checkpoint: --resume auto goes on from there.")
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step-{kept:08d}"


def test_a_checkpoint_that_could_not_be_written_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fills_the_disk(monkeypatch, 1)
    with Processes() as processes:
        checkpoints = Checkpoints(tmp_path, 2, processes)
        checkpoints.save(1, {"student.x": torch.zeros(3)}, {"step": 1})
        with pytest.raises(KdflowError, match="no space"):
            checkpoints.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["step", "checkpoint"])
@pytest.mark.parametrize("error", [KdflowError, ConnectionError])
def test_a_tracker_that_fails_leaves_a_checkpoint_and_what_the_others_know(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: type[Exception]
) -> None:
    def fails(_: Any, event: dict[str, Any]) -> None:
        if (event["event"], event["step"]) in ((kind, 2), ("checkpoint", 2)):
            raise error("its server is gone")

    run = run_file(tracking=["console", "jsonl"], training={"checkpoint_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleTracker, "event", fails)
        with pytest.raises(KdflowError, match="its server is gone") as stopped:
            kdflow.train(run)
    if error is not KdflowError:
        told = f"tracker 'console' failed at the event '{kind}': ConnectionError: its server is gone"
        assert str(stopped.value).startswith(told)
    stands = "Step 2 is kept as a checkpoint" if kind == "step" else "The last checkpoint stands"
    assert str(stopped.value).splitlines()[1:] == [f"{stands}: --resume auto goes on from there."]
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [1, 2]
    kdflow.train(run, resume="auto")
    assert [event["step"] for event in events(tmp_path / "run", "resumed")] == [2]
    assert [event["step"] for event in events(tmp_path / "run", "step")] == [1, 2, 3, 4]


def test_a_teacher_is_closed_also_where_there_is_no_student(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = list[str]()

    def fails(*_: Any) -> None:
        raise KdflowError("no student")

    monkeypatch.setattr(Student, "__init__", fails)
    monkeypatch.setattr(Teacher, "close", lambda self: closed.append(self.engine.name))
    with pytest.raises(KdflowError, match="no student"):
        kdflow.train(run_file())
    assert closed == ["transformers"]


def test_the_parts_of_the_start_are_told_before_the_first_step(run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file())
    (ready,) = events(tmp_path / "run", "ready")
    parts = ready["parts"]
    assert all(parts[name] > 0 for name in ("data", "teacher", "student"))
    assert parts["rollout"] < parts["student"]
    assert sum(parts.values()) < ready["seconds"]
    assert ready["step"] == 0


def test_every_parameter_moves(run_file: RunFile, tiny: dict[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kdflow.train(run_file(student={"model": tiny["untied"]}))
    export(tmp_path / "run", tmp_path / "exported")
    before = dict(AutoModelForCausalLM.from_pretrained(tiny["untied"]).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name].float(), after[name].float())] == []


def test_an_evaluation_leaves_what_a_checkpoint_holds_as_it_is(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, tensors, state: saved.append(tensors))
    training = {"steps": 2, "tokens_per_step": 100, "evaluate_every": 1, "checkpoint_every": 1}
    kdflow.train(run_file(training={**run_file()["training"], **training}))
    assert len(saved) == 2
    for tensors in saved:
        trained = [name.removeprefix("student.") for name in tensors if name.startswith("student.")]
        assert trained
        assert [name for name in trained if f"optimizer.{name}.exp_avg" not in tensors] == []


def test_saving_copies_before_it_returns(tmp_path: Path) -> None:
    """DCP's own async_save once wrote what the optimizer had changed meanwhile (pytorch #144657)."""
    with Processes() as processes:
        checkpoints = Checkpoints(tmp_path, 2, processes)
        tensors = {"student.x": torch.arange(100_000.0)}
        checkpoints.save(1, tensors, {"step": 1})
        tensors["student.x"].zero_()
        checkpoints.wait()
        found = {"student.x": torch.empty(100_000)}
        load_tensors(tmp_path / "step-00000001", found, processes.control)
    assert torch.equal(found["student.x"], torch.arange(100_000.0))


COUNTING = """
import kdflow
import torch
from kdflow.contracts import LossSum

class Counted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

class Counting(kdflow.Algorithm):
    name = "counting"
    needs = frozenset()
    def build(self, student, teacher):
        return Counted()
    def loss(self, student, teacher, batch):
        self.module.rows += len(student.rows)
        return LossSum(student.rows.square().sum(), {"rows": (self.module.rows.float(), 1.0)})

@kdflow.hookimpl
def kdflow_algorithms():
    return [Counting]
"""


def test_what_an_algorithms_module_counts_goes_on_after_a_resume(run_file: RunFile, site: Path, tmp_path: Path) -> None:
    plugin("kdflow_counting", COUNTING).install(site)
    made = {**run_file(algorithm={"name": "counting"}, training={"checkpoint_every": 2}), "teacher": None}
    kdflow.train(made)
    counts = trajectory(tmp_path / "run", ["rows"])
    assert counts == sorted(set(counts))
    output = interrupted(tmp_path / "run", tmp_path / "again", 2)
    kept = {name for name in saved(output / "checkpoints" / "step-00000002") if "student.algorithm" in name}
    assert kept == {"student.algorithm.rows"}
    kdflow.train({**made, "output": str(output)}, resume="auto")
    assert trajectory(output, ["rows"]) == counts
    export(output, tmp_path / "exported")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("boom",))


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (pickle.dumps(_Bomb()), "a checkpoint's metadata may not name builtins.print"),
        (b"", "Ran out of input"),
        (b"\x80\x04.", ".+"),
    ],
)
def test_metadata_cannot_run_code(tmp_path: Path, metadata: bytes, told: str) -> None:
    (tmp_path / ".metadata").write_bytes(metadata)
    with pytest.raises(
        KdflowError, match=rf"\.metadata is not what kdflow wrote: ({told}); do not use this"
    ) as stopped:
        load_tensors(tmp_path, {"student.x": torch.empty(1)})
    assert "does not fit" not in str(stopped.value)


@pytest.mark.parametrize("gone", [".metadata", "*.distcp"])
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_told_as_such(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    kdflow.train(run_file())
    loads = export_module.load_tensors

    def deletes(path: Path, *arguments: Any) -> None:
        for file in path.glob(gone):
            file.unlink()
        caplog.clear()
        loads(path, *arguments)

    monkeypatch.setattr(export_module, "load_tensors", deletes)
    with pytest.raises(KdflowError, match=r"step-00000004 was deleted while it was read.*: try again") as stopped:
        export(tmp_path / "run", tmp_path / "exported")
    assert "does not fit" not in str(stopped.value)
    assert [record for record in caplog.records if record.exc_info and record.levelname == "WARNING"] == []


def test_what_a_checkpoint_cannot_be_loaded_for_is_never_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CheckpointException("", {0: (AssertionError(), None)})

    monkeypatch.setattr(checkpoint_module, "load", fails)
    monkeypatch.setattr(checkpoint_module._Reader, "read_metadata", lambda _: None)
    with pytest.raises(KdflowError, match=r"does not fit the student of this run: AssertionError\. Give"):
        load_tensors(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ],
)
def test_schedule(name: Any, expected: list[float]) -> None:
    training = TrainingConfig(steps=10, warmup=0.2, schedule=name)
    assert [schedule(step, training) for step in range(1, 11)] == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "steps", "warm"), [(0.07, 100, 7), (0.14, 50, 7), (0.03, 10, 1), (0.05, 50, 3)])
def test_warm_up_is_rounded_up_but_not_from_a_whole_number(warmup: float, steps: int, warm: int) -> None:
    training = TrainingConfig(steps=steps, warmup=warmup, schedule="constant")
    assert sum(schedule(step, training) < 1 for step in range(1, steps + 1)) == warm - 1


def test_how_the_teachers_rows_travel_is_told(run_file: RunFile, tmp_path: Path) -> None:
    kdflow.train(run_file())
    assert events(tmp_path / "run", "teacher") == [
        {"event": "teacher", "step": 0, "engine": "transformers", "transport": "in_process", "copies_per_row": 0,
         "bytes_per_row": 48 * 4}
    ]  # fmt: skip
