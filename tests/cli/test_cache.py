"""``kdflow cache``: runs that train from a capture, captures that were killed, and refusals."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdflow
from kdflow.contracts import KdflowError, Pair, Tokens
from kdflow.engines.cache.shards import Shards
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.runtime import capture as capture_module
from tests.support.commands import Command, WriteRun
from tests.support.models import texts, write_jsonl
from tests.support.runs import events, kill_when, trajectory
from tests.support.runs import train as train_process

RunFile = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def own_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path / "kdflow"))


def rows_of(path: Path) -> dict[bytes, tuple[list[int], torch.Tensor]]:
    """Targets and rows of every sequence, however they are divided among shards."""
    shards = Shards(path)
    found = {}
    for key in shards._places:
        targets = shards.targets(key)
        rows = shards.rows(key, targets)
        assert rows is not None
        found[key] = (targets.tolist(), rows)
    return found


def assert_same_rows(one: Path, other: Path) -> None:
    found, expected = rows_of(one), rows_of(other)
    assert list(found) == list(expected)
    for key, (targets, rows) in found.items():
        assert targets == expected[key][0]
        assert torch.equal(rows, expected[key][1])


def train(run: dict[str, Any], output: Path, **teacher: Any) -> list[tuple[Any, ...]]:
    kdflow.train({**run, "teacher": {**run["teacher"], **teacher}, "output": str(output)})
    return [*trajectory(output), *((event["divergence"], event["cross_entropy"]) for event in events(output, "eval"))]


def assert_same_trajectory(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert found == expected
    assert expected[0][1] != expected[3][1], "nothing was learnt: the comparison would mean nothing"


def test_training_from_a_capture_follows_the_trajectory_of_the_teacher(
    command: Command, write_run: WriteRun, run_file: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    """One capture of no path; other losses, another student, other micro-batches, two epochs of it."""
    result = command("cache", write_run(), "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert Path(told["path"]).parent == tmp_path / "kdflow" / "captures"
    assert told["samples"] == told["captured_samples"] == 54
    assert told["target_tokens"] == told["captured_target_tokens"]
    assert told["bytes_per_token"] == 48 * 4 + 4
    assert f"54 samples, {told['target_tokens']:,} target tokens\n196 bytes per target token; " in result.err
    (tmp_path / "cached").mkdir()
    for name, sections in {
        "plain": {},
        "jsd": {"algorithm": {"name": "jsd", "ce_weight": 0.2}, "seed": 3, "training": {"steps": 12}},
        "small": {"algorithm": {"name": "reverse_kl"}, "student": {"model": tiny["untied"]},
                  "data": {**run_file()["data"], "max_tokens": 128}},
    }.items():  # fmt: skip
        run = run_file(**sections)
        expected = train(run, tmp_path / name)
        assert_same_trajectory(train(run, tmp_path / "cached" / name, engine={"name": "cache"}), expected)
        assert events(tmp_path / "cached" / name, "eval")[0]["divergence"] is not None


def test_check_tells_what_is_not_captured_before_a_run_finds_out(
    command: Command, write_run: WriteRun, tiny: dict[str, str]
) -> None:
    def check() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(command("check", run, "--json").out)
        return found

    run = write_run()
    plain = check()
    run = write_run(teacher={"model": tiny["teacher"], "engine": {"name": "cache"}})
    (problem,) = check()["problems"]
    assert "there is no capture of the teacher's rows at" in problem
    assert command("cache", run, "data.eval=[]").code == 0
    (problem,) = check()["problems"]
    assert problem.startswith(f"{tiny['eval']}: the teacher's rows of 6 of 6 samples that were looked at are not capt")
    assert command("cache", run).code == 0
    found = check()
    assert found["problems"] == []
    assert found["memory"]["bytes"]["teacher"] == 392 * 48 * 4 < plain["memory"]["bytes"]["teacher"]
    assert found["flops_per_step"] < plain["flops_per_step"]


def test_two_ranks_train_from_one_capture(
    command: Command, write_run: WriteRun, run_file: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    """Each finds the rows of its own micro-batches; fillers have none. One sample a step: a rank runs fillers alone."""
    run = run_file(training={"tokens_per_step": 1})
    plain = [loss for _, loss, *_ in train(run, tmp_path / "plain")[:4]]
    assert command("cache", write_run()).code == 0
    cached = {
        **run,
        "teacher": {"model": tiny["teacher"], "engine": {"name": "cache"}},
        "output": str(tmp_path / "two"),
    }
    train_process(cached, "--nproc-per-node", "2")
    assert [loss for _, loss in trajectory(tmp_path / "two", ["loss"])] == pytest.approx(plain, rel=2e-5)


@pytest.mark.parametrize(
    "algorithm",
    [{"name": "uld", "merge": "skip"}, {"name": "overlap"}, {"name": "dskd", "alignment": "cma"}],
    ids=["targets are dropped", "overlap", "embeddings are needed"],
)
def test_between_tokenizers_too(
    command: Command, write_run: WriteRun, run_file: RunFile, tiny: dict[str, str], tmp_path: Path,
    algorithm: dict[str, Any],
) -> None:  # fmt: skip
    sections = {"teacher": {"model": tiny["foreign"]}, "algorithm": algorithm}
    assert command("cache", write_run(**sections), "-o", tmp_path / "rows").code == 0
    run = run_file(**sections)
    engine = {"name": "cache", "path": str(tmp_path / "rows")}
    assert_same_trajectory(train(run, tmp_path / "cached", engine=engine), train(run, tmp_path / "plain"))


def test_a_run_file_that_names_the_cache_says_where_it_is_written(
    command: Command, write_run: WriteRun, tiny: dict[str, str], tmp_path: Path
) -> None:
    engine = {"name": "cache", "path": str(tmp_path / "rows")}
    run = write_run(teacher={"model": tiny["teacher"], "engine": engine})
    refused = command("train", run)
    assert refused.code == 2
    assert f"no capture of the teacher's rows at {tmp_path / 'rows'}: write it with this run file" in refused.err
    result = command("cache", run)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "rows" / "capture.json").read_text())["engine"] == {"name": "transformers"}
    assert "captured now" in result.out
    assert command("train", run).code == 0


def test_a_kill_at_any_moment_and_the_same_command_again_give_what_one_run_gives(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command("cache", run, "-o", whole).code == 0
    code = (
        "import kdflow.runtime.capture as c; c._SHARD_BYTES = 1; import kdflow.cli; import sys; "
        f"kdflow.cli.main(['cache', {str(run)!r}, '-o', {str(killed)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    kill_when(process, lambda: len(list(killed.glob("rows-*"))) >= 2)
    done = rows_of(killed)
    assert 0 < len(done) < 54
    part = killed / ".rows-99999.safetensors-0123456789abcdef"
    part.write_bytes(next(killed.glob("rows-*")).read_bytes()[:-9])  # what a kill while writing leaves behind
    result = command("cache", run, "-o", killed, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["stored_samples"], told["captured_samples"]) == (len(done), 54 - len(done))
    assert f"{len(done)} samples are there" in result.err
    assert not part.exists()
    assert_same_rows(killed, whole)


def test_a_capture_grows_with_further_data_and_keeps_what_it_has(
    command: Command, write_run: WriteRun, run_file: RunFile, tmp_path: Path
) -> None:
    """Texts that are there already are not captured again; a prompt is learnt from as a text, and then not."""
    text = texts()[0][:200]
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": text}, {"text": "Emma Woodhouse, handsome"}])
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": text}, {"text": "clever, and rich, with"}])
    turns = write_jsonl(tmp_path / "turns.jsonl", [{"prompt": text[:100], "response": text[100:]}])

    def cache(path: str, *formats: str) -> dict[str, Any]:
        data = {**run_file()["data"], "train": [{"path": path, "format": one} for one in formats], "eval": []}
        result = command("cache", write_run(data=data), "-o", tmp_path / "rows", "--json")
        assert result.code == 0, result.err
        found: dict[str, Any] = json.loads(result.out)
        return found

    assert cache(small, "text", "text")["captured_samples"] == 2
    before = rows_of(tmp_path / "rows")
    again = cache(small, "text")
    assert (again["needed_bytes"], again["captured_samples"]) == (0, 0)
    told = cache(more, "text")
    assert (told["samples"], told["stored_samples"], told["captured_samples"]) == (2, 1, 1)
    cache(turns, "prompt_response")
    for key, (targets, rows) in before.items():
        assert rows_of(tmp_path / "rows")[key][0] == targets
        assert torch.equal(rows_of(tmp_path / "rows")[key][1], rows)


def test_one_text_with_several_targets_is_stored_with_all_of_them(tmp_path: Path) -> None:
    def pair(*targets: int) -> Pair:
        tokens = Tokens(np.arange(9), np.array(targets), np.zeros(len(targets), np.int64))
        return Pair("x", tokens, tokens)

    class Table:
        rows = (pair(3, 4), pair(1, 4))

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return namedtuple("Prepared", "pair")(self.rows[index])

    ((_, united),) = capture_module._Samples([Table()])  # type: ignore[list-item]
    assert united.teacher is not None
    assert united.teacher.targets.tolist() == [1, 3, 4]


def test_it_refuses_when_the_disk_is_too_small(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    result = command("cache", write_run(), "-o", tmp_path / "rows")
    assert result.code == 2
    assert "196 bytes per target token" in result.err
    assert "are to be written, and its disk has 1,000 free: free some, give another directory" in result.err
    assert not list((tmp_path / "rows").glob("*.safetensors"))


def test_a_disk_that_is_full_in_the_end_is_told_and_loses_nothing_that_was_written(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = write_run(), os.fsync
    monkeypatch.setattr(capture_module, "_SHARD_SECONDS", 0.0)  # a shard a micro-batch

    def fsync(descriptor: int) -> None:
        if "/.rows-00002.safetensors-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        result = command("cache", run, "-o", tmp_path / "rows")
    assert result.code == 2
    assert "rows-00002.safetensors cannot be written: No space left on device; mend it, and the same" in result.err
    assert not list((tmp_path / "rows").glob(".rows-*"))
    assert command("cache", run, "-o", tmp_path / "rows").code == 0
    assert command("cache", run, "-o", tmp_path / "whole").code == 0
    assert_same_rows(tmp_path / "rows", tmp_path / "whole")


@pytest.mark.parametrize(("sections", "arguments", "message"), [
    ({"teacher": None, "algorithm": {"name": "sft"}}, [], "the run file names no teacher"),
    ({"teacher": {"follow": {"every": 2}, "model": None}}, [], "teacher.follow: such a teacher changes"),
    ({}, ["--engine", "cache"], "--engine cache reads captures"),
    ({}, ["--engine", "transformer"], "did you mean 'transformers'?"),
    ({}, ["-o", "{tmp}"], "and is no capture: give another directory"),
    ({"rollout": {"fraction": 0.5}}, [], "rollout.fraction: rows are stored of samples that are known beforehand"),
    ({}, ["data.train.0.streaming=true"], "data.train is streamed, and rows are stored of samples that are known"),
])  # fmt: skip
def test_what_cannot_be_captured_is_refused(
    command: Command, write_run: WriteRun, tmp_path: Path, sections: dict[str, Any], arguments: list[str], message: str
) -> None:
    result = command("cache", write_run(**sections), *(word.format(tmp=tmp_path) for word in arguments))
    assert result.code == 2
    assert message in result.err


def test_an_engine_that_fails_is_told_with_how_to_go_on(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KdflowError("teacher.engine 'transformers' failed")

    monkeypatch.setattr(TransformersTeacher, "score", fail)
    result = command("cache", write_run(), "-o", tmp_path / "rows")
    assert result.code == 2
    assert "engine 'transformers' failed\nThe same command goes on where it stopped" in result.err


def test_hidden_files_that_were_there_before_the_capture_stay(
    command: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / ".mine.safetensors").write_text("mine")
    assert command("cache", write_run(), "-o", tmp_path / "rows").code == 0
    assert (tmp_path / "rows" / ".mine.safetensors").read_text() == "mine"


def test_an_engine_that_does_not_start_leaves_the_directory_to_another(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = write_run(), tmp_path / "rows"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        result = command("cache", run, "-o", rows, "--engine", "sglang")
    assert "needs the package sglang" in result.err
    assert command("cache", run, "-o", rows).code == 0
    result = command("cache", run, "-o", rows, "--engine", "sglang")
    assert "was captured otherwise: engine.data_parallel was None and is 1; " in result.err
    assert "engine.name was 'transformers' and is 'sglang'; " in result.err


def test_options_of_an_engine_that_change_no_row_may_change(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's own errors ask for it."""
    run, rows = write_run(), tmp_path / "rows"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "needs the package sglang" in command("cache", run, "-o", tmp_path / "none", "--engine", "sglang").err
    assert command("cache", run, "-o", rows).code == 0
    shutil.copy(tmp_path / "none" / "capture.json", rows)  # as if SGLang had computed the rows
    options = "timeout: 900, start_timeout: 60, memory_fraction: 0.3, placement: dedicated"
    again = command("cache", run, "-o", rows, "--engine", f"{{name: sglang, {options}}}")
    assert (again.code, again.err.count("captured otherwise")) == (0, 0)
    other = command("cache", run, "-o", rows, "--engine", "{name: sglang, quantization: fp8, timeout: 900}")
    assert f"{rows} was captured otherwise: engine.quantization was None and is 'fp8'. Give the same" in other.err


def test_another_teacher_or_dtype_is_not_mixed_in(
    command: Command, write_run: WriteRun, tiny: dict[str, str], tmp_path: Path
) -> None:
    run, rows = write_run(), tmp_path / "rows"
    assert command("cache", run, "-o", rows).code == 0
    before = rows_of(rows)
    for override, changed in (
        (f"teacher.model={tiny['student']}", "config was '"),
        ("training.dtype=bfloat16", "dtype was 'float32' and is 'bfloat16'"),
    ):
        result = command("cache", run, override, "-o", rows)
        assert result.code == 2
        assert f"{rows} was captured otherwise: {changed}" in result.err
    assert list(rows_of(rows)) == list(before)
