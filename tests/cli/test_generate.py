"""``kdflow generate``: responses that ``sft`` trains on, resumed after real kills, and refusals."""

from __future__ import annotations

import datetime
import errno
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdflow.contracts import EngineContext, Rollout, RolloutEngine, Sampling
from kdflow.engines.transformers.rollout import TransformersRollout, TransformersRolloutOptions
from kdflow.evaluation.answers import is_correct
from kdflow.runtime import generate as generate_module
from tests.support.commands import Command, Result, WriteRun
from tests.support.models import TEMPLATE, make_model, make_tokenizer, texts, write_jsonl
from tests.support.runs import kill_when

Generate = Callable[..., Result]


def conversations(count: int) -> list[dict[str, Any]]:
    """Prompts of many lengths, each with a field that is carried over."""
    return [
        {"messages": [{"role": "user", "content": text[: 5 + 7 * number]}], "number": number}
        for number, text in enumerate(texts()[:count])
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def responses(model: str, records: list[dict[str, Any]], sampling: Sampling) -> list[Rollout]:
    """What the engine generates after the first turn of each record."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    context = EngineContext(torch.device("cpu"), torch.float32)
    prompts = [
        tokenizer.apply_chat_template(record["messages"][:1], add_generation_prompt=True, return_dict=False)
        for record in records
    ]
    return TransformersRollout(model, TransformersRolloutOptions(), context).generate(prompts, sampling)


def written_by(model: str, records: list[dict[str, Any]], sampling: Sampling) -> list[dict[str, Any]]:
    """The records that are to be written."""
    tokenizer, written = AutoTokenizer.from_pretrained(model), []
    for at, rollout in enumerate(responses(model, records, sampling)):
        record, sample = records[at // sampling.n], at % sampling.n
        ids = rollout.ids[:-1] if rollout.finish == "stop" else rollout.ids
        text = tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
        turns = [record["messages"][0], {"role": "assistant", "content": text}]
        if text.strip():
            written.append({**record, "messages": turns, "finish": rollout.finish, "sample": sample})
    return written


def table(result: Result) -> dict[str, str]:
    """The final table, row by row."""
    rows = [[cell.strip() for cell in line.split("│")] for line in result.out.splitlines() if line.count("│") == 3]
    return {name: value for _, name, value, _ in rows}


@pytest.fixture
def generate(command: Command, write_run: WriteRun, tmp_path: Path) -> Generate:
    """Runs ``kdflow generate`` on ``records``, which it writes to ``prompts.jsonl``."""

    def call(records: list[dict[str, Any]], *options: object, output: str = "responses.jsonl") -> Result:
        prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
        return command("generate", write_run(), "--prompts", prompts, "-o", tmp_path / output, "--max-new-tokens", 12,
                       *options)  # fmt: skip

    return call


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "_WINDOW", {"cpu": 4})


def test_records_hold_the_teachers_turn_and_everything_else(
    generate: Generate, tiny: dict[str, str], tmp_path: Path
) -> None:
    records = conversations(5)
    records[1]["messages"].append({"role": "assistant", "content": "to be written anew"})
    result = generate(records, "--n", 2, "--temperature", 0.8, "--seed", 3)
    assert result.code == 0, result.err
    sampling = Sampling(12, temperature=0.8, n=2, seed=3)
    expected = written_by(tiny["teacher"], records, sampling)
    assert read(tmp_path / "responses.jsonl") == expected
    told = table(result)
    assert (told["prompts"], told["responses"], told["kept"]) == ("5", "10", str(len(expected)))
    rollouts = responses(tiny["teacher"], records, sampling)
    assert told["cut off by length"] == str(sum(rollout.finish == "length" for rollout in rollouts))
    assert told["empty, left out"] == str(10 - len(expected))
    assert told["tokens"] == str(sum(len(rollout.ids) for rollout in rollouts))
    assert float(told["tokens/s"].replace(",", "")) > 0
    assert "prompts 5/5 · 10 responses" in result.err


def test_sft_trains_on_what_was_generated_and_learns_it(
    command: Command, write_run: WriteRun, tiny: dict[str, str], tmp_path: Path
) -> None:
    for name, records in (
        ("chat", conversations(8)),
        ("prompt_response", [{"prompt": "Emma"}, {"prompt": "Anne was"}]),
    ):
        prompts, output = write_jsonl(tmp_path / f"{name}.jsonl", records), tmp_path / f"{name}.responses.jsonl"
        data = {"train": [{"path": str(output), "format": name}], "eval": [{"path": str(output), "format": name}]}
        run = write_run(data=data, algorithm={"name": "sft"}, output=str(tmp_path / name), training={"steps": 12})
        # One run file for both: the responses need not be there before they are generated.
        made = command("generate", run, "--prompts", prompts, "-o", output, "--max-new-tokens", 12, "--n", 4)
        assert made.code == 0, made.err
        trained = command("train", run)
        assert trained.code == 0, trained.err
        evaluation = json.loads((tmp_path / name / "summary.json").read_text())["evaluation"]
        assert evaluation["after"]["cross_entropy"] < evaluation["before"]["cross_entropy"] - 0.3


def test_a_checkpoint_responds_as_the_student_was_trained(
    command: Command, write_run: WriteRun, tiny: dict[str, str], tmp_path: Path
) -> None:
    student = {"model": tiny["student"], "keep_layers": "1:"}
    run = write_run(teacher=None, algorithm={"name": "sft"}, student=student, training={"learning_rate": 3e-3})
    assert command("train", run).code == 0
    assert command("export", tmp_path / "run", "-o", tmp_path / "exported").code == 0
    records = conversations(8)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    expected = written_by(str(tmp_path / "exported"), records, Sampling(12))
    assert expected != written_by(tiny["student"], records, Sampling(12))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    for directory in (tmp_path / "run", checkpoint):
        output = tmp_path / f"{directory.name}.jsonl"
        result = command("generate", run, "--prompts", prompts, "-o", output, "--checkpoint", directory,
                         "--max-new-tokens", 12)  # fmt: skip
        assert result.code == 0, result.err
        assert read(output) == expected
        assert not output.with_name(f".{output.name}.student").exists()


@pytest.mark.parametrize("kind", ["messages", "prompt"])
def test_the_teacher_sees_its_own_prompt_and_a_student_the_records(
    command: Command, write_run: WriteRun, tmp_path: Path, kind: str
) -> None:
    run = write_run(training={"steps": 1})
    assert command("train", run).code == 0
    whole = [text[:60] for text in texts()[:3]]
    if kind == "prompt":
        own: list[dict[str, Any]] = [{"prompt": text[:20]} for text in whole]
        told: list[dict[str, Any]] = [{"prompt": text} for text in whole]
    else:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
        own = [{"messages": turns} for _ in whole]
        told = [{"messages": [{"role": "system", "content": text}, turns[1]]} for text in whole]
    both = [{**record, "teacher_prompt": text} for record, text in zip(own, whole, strict=True)]

    def respond(name: str, records: list[dict[str, Any]], *options: object) -> list[dict[str, Any]]:
        prompts, output = write_jsonl(tmp_path / f"{name}.prompts.jsonl", records), tmp_path / f"{name}.jsonl"
        result = command("generate", run, "--prompts", prompts, "-o", output, "--max-new-tokens", 12, *options)
        assert result.code == 0, result.err
        return read(output)

    def said(records: list[dict[str, Any]]) -> list[str]:
        return [record["response"] if kind == "prompt" else record["messages"][-1]["content"] for record in records]

    by_teacher = respond("both", both)
    assert said(by_teacher) == said(respond("told", told)) != said(respond("own", own))
    # What is trained on are the records' own prompts.
    assert [{**record, "response": "", "messages": record.get("messages", [])[:-1]} for record in by_teacher] == [
        {**record, "response": "", "messages": record.get("messages", []), "finish": written["finish"], "sample": 0}
        for record, written in zip(both, by_teacher, strict=True)
    ]
    student = ["--checkpoint", tmp_path / "run"]
    assert said(respond("both-student", both, *student)) == said(respond("own-student", own, *student))

    beside = tmp_path / "both.jsonl.progress.json"  # as before the teacher saw them
    began = json.loads(beside.read_text())
    assert began["settings"].pop("teacher_prompt") is True
    beside.write_text(json.dumps(began))
    prompts, output = tmp_path / "both.prompts.jsonl", tmp_path / "both.jsonl"
    again = command("generate", run, "--prompts", prompts, "-o", output, "--max-new-tokens", 12)
    assert again.code == 2
    assert "both.jsonl was begun with other settings" in again.err


def test_verified_keeps_the_first_right_response_of_each_prompt(generate: Generate, tmp_path: Path) -> None:
    records = conversations(6)
    assert generate(records, "--n", 4, output="all.jsonl").code == 0
    everything = read(tmp_path / "all.jsonl")
    # Of half the prompts the answer is what their second response says.
    for record in records:
        second = next(r for r in everything if r["number"] == record["number"] and r["sample"] == 1)
        record["answer"] = second["messages"][-1]["content"] if record["number"] % 2 else "nothing of the kind"
    result = generate(records, "--n", 4, "--keep", "verified")
    assert result.code == 0, result.err
    kept = read(tmp_path / "responses.jsonl")
    expected = {}
    for record in everything:
        answer = records[record["number"]]["answer"]
        if is_correct(record["messages"][-1]["content"], answer):
            expected.setdefault(record["number"], {**record, "answer": answer})
    assert [record["number"] for record in kept] == [1, 3, 5]
    assert kept == list(expected.values())
    told = table(result)
    assert (told["responses"], told["kept"], told["prompts without a verified response"]) == ("24", "3", "3")


def test_a_kill_at_any_moment_and_the_same_command_again_give_what_one_run_gives(
    generate: Generate, write_run: WriteRun, tmp_path: Path, small_windows: None
) -> None:
    records = conversations(24)
    assert generate(records, "--n", 2, output="whole.jsonl").code == 0
    output, beside = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.progress.json"
    code = "import kdflow.runtime.generate as g; g._WINDOW = {'cpu': 4}; import kdflow.cli; kdflow.cli.main()"
    arguments = ["generate", tmp_path / "run.yaml", "--prompts", tmp_path / "prompts.jsonl", "-o", output,
                 "--max-new-tokens", 12, "--n", 2]  # fmt: skip

    def done() -> int:
        return int(json.loads(beside.read_text())["progress"]["prompts"]) if beside.exists() else 0

    for prompts in (1, 9):
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], start_new_session=True,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        kill_when(process, lambda prompts=prompts: done() >= prompts)  # type: ignore[misc]
        assert prompts <= done() < len(records)
        with output.open("a", encoding="utf-8") as stream:
            stream.write('{"messages": [{"role": "us')  # what a kill while writing leaves behind
    result = generate(records, "--n", 2, output="killed.jsonl")
    assert result.code == 0, result.err
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    told, whole = (
        json.loads(path.read_text())["progress"] for path in (beside, tmp_path / "whole.jsonl.progress.json")
    )
    assert {**told, "seconds": 0} == {**whole, "seconds": 0}


def test_a_file_that_is_complete_is_left_as_it_is(generate: Generate, tiny: dict[str, str], tmp_path: Path) -> None:
    first = generate(conversations(3))
    before = (tmp_path / "responses.jsonl").read_bytes()
    again = generate(conversations(3))
    assert (again.code, again.out) == (0, first.out)
    assert (tmp_path / "responses.jsonl").read_bytes() == before


@pytest.mark.parametrize(("options", "changed"), [
    (["--seed", 1], "seed was 0 and is 1"),
    (["--n", 2], "n was 1 and is 2"),
    (["--temperature", 0.5, "--top-p", 0.9], "temperature was 1.0 and is 0.5; top_p was 1.0 and is 0.9"),
    (["--max-new-tokens", 13], "max_new_tokens was 12 and is 13"),
    (["--engine", "{name: transformers, batch_tokens: 99}"],
     "engine.batch_tokens was 16384 and is 99"),
    (["training.dtype=bfloat16"], "dtype was 'float32' and is 'bfloat16'"),
])  # fmt: skip
def test_other_settings_than_before_are_refused(
    generate: Generate, tmp_path: Path, options: list[object], changed: str
) -> None:
    assert generate(conversations(2)).code == 0
    before = (tmp_path / "responses.jsonl").read_bytes()
    result = generate(conversations(2), *options)
    assert result.code == 2
    assert f"responses.jsonl was begun with other settings: {changed}. Give the same" in result.err
    assert (tmp_path / "responses.jsonl").read_bytes() == before


def test_options_of_an_engine_that_change_no_response_may_change(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine's own errors ask for it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    began = "rollout.engine 'sglang' needs the package sglang"
    for options in ("", ", cache_tokens: 4096", ", timeout: 900, start_timeout: 60, memory_fraction: 0.3"):
        assert began in generate(conversations(2), "--engine", f"{{name: sglang{options}}}").err
    other = generate(conversations(2), "--engine", "{name: sglang, cache_tokens: 9, attention_backend: triton}")
    assert "begun with other settings: engine.attention_backend was None and is 'triton'. Give the same" in other.err


def test_other_prompts_and_another_model_are_other_settings(
    generate: Generate, tiny: dict[str, str], tmp_path: Path
) -> None:
    assert generate(conversations(2)).code == 0
    assert "settings: prompts was '" in generate(conversations(3)).err
    other = generate(conversations(2), f"teacher.model={tiny['student']}")
    assert f"teacher was '{tiny['teacher']}' and is '{tiny['student']}'" in other.err


def test_another_model_under_the_same_path_is_another_setting(
    command: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    directory = tmp_path / "teacher"
    prompts, run = (
        write_jsonl(tmp_path / "prompts.jsonl", conversations(2)),
        write_run(teacher={"model": str(directory)}),
    )

    def respond() -> Result:
        return command("generate", run, "--prompts", prompts, "-o", tmp_path / "out.jsonl", "--max-new-tokens", 12)

    make_model(directory, tokenizer=make_tokenizer())
    assert respond().code == 0
    make_model(directory, tokenizer=make_tokenizer())  # the same once more
    assert respond().code == 0
    for part, changes in (
        ("weights", {"tokenizer": make_tokenizer(), "seed": 1}),
        ("tokenizer", {"tokenizer": make_tokenizer(template=TEMPLATE + " ")}),
    ):
        make_model(directory, **changes)
        refused = respond()
        assert refused.code == 2
        assert f"out.jsonl was begun with other settings: {part} was '" in refused.err
    make_model(directory, tokenizer=make_tokenizer())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert "out.jsonl was begun with other settings: config was '" in respond().err


def test_a_run_that_was_trained_anew_is_another_setting(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", conversations(2))
    run = write_run(teacher=None, algorithm={"name": "sft"}, training={"steps": 1})

    def respond() -> Result:
        return command("generate", run, "--prompts", prompts, "-o", tmp_path / "out.jsonl", "--max-new-tokens", 12,
                       "--checkpoint", tmp_path / "run")  # fmt: skip

    assert command("train", run).code == 0
    assert [respond().code for _ in range(2)] == [0, 0]
    shutil.rmtree(tmp_path / "run")
    assert command("train", run, "training.learning_rate=0.1").code == 0
    refused = respond()
    assert refused.code == 2
    assert "out.jsonl was begun with other settings: weights was '" in refused.err


def test_an_output_that_is_not_ours_or_was_changed_or_is_in_use_is_left_alone(
    generate: Generate, tmp_path: Path
) -> None:
    output, beside = tmp_path / "responses.jsonl", tmp_path / "responses.jsonl.progress.json"
    output.write_text("mine\n")
    result = generate(conversations(2))
    assert (result.code, output.read_text()) == (2, "mine\n")
    assert (
        "exists, and there is no responses.jsonl.progress.json beside it: kdflow generate did not write" in result.err
    )
    output.unlink()
    assert generate(conversations(2)).code == 0
    whole = output.read_bytes()
    with output.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "responses.jsonl is being written by another process" in generate(conversations(2)).err
    output.write_bytes(whole[:-5])
    assert "is shorter than responses.jsonl.progress.json says" in generate(conversations(2)).err
    told = json.loads(beside.read_text())
    for broken in (
        {}, [], {**told, "settings": []}, {**told, "settings": None}, {**told, "progress": {"size": "5"}},
    ):  # fmt: skip
        beside.write_text(json.dumps(broken))
        refused = generate(conversations(2))
        assert "responses.jsonl.progress.json is not what kdflow generate wrote" in refused.err
    assert output.read_bytes() == whole[:-5]


def test_lines_that_were_added_to_a_finished_file_are_not_lost(generate: Generate, tmp_path: Path) -> None:
    assert generate(conversations(2)).code == 0
    output = tmp_path / "responses.jsonl"
    with output.open("a", encoding="utf-8") as stream:
        stream.write('{"mine": 1}\n')
    before = output.read_bytes()
    result = generate(conversations(2))
    assert result.code == 2
    assert "responses.jsonl is longer than responses.jsonl.progress.json says, and all prompts are" in result.err
    assert output.read_bytes() == before


@pytest.mark.parametrize("output", [".", "", "/", "folder"])
def test_a_directory_as_the_output_is_refused_before_prompts_are_read(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    result = command("generate", write_run(), "--prompts", tmp_path / "absent.jsonl", "-o", output)
    there = Path(output) / "responses.jsonl"
    assert result.code == 2
    assert f"{Path(output)} is a directory; give a file as the output, such as {there}" in result.err


def test_an_output_that_is_no_regular_file_is_refused_and_nothing_is_left_beside_it(
    command: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "redirected").open("w") as stream:
        for output in (tmp_path / "fifo", Path("/dev/null"), Path(f"/dev/fd/{stream.fileno()}")):
            prompts = tmp_path / "absent.jsonl"  # which would be told first
            result = command("generate", write_run(), "--prompts", prompts, "-o", output)
            assert (result.code, f"{output} is no regular file" in result.err) == (2, True)
            assert not output.with_name(f"{output.name}.progress.json").exists()


def test_prompts_may_stand_in_a_table_but_its_dates_cannot_be_carried_over(
    command: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    columns = {"prompt": ["Emma", "Anne was"], "answer": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "prompts.parquet")
    arguments = ["generate", write_run(), "--prompts", tmp_path / "prompts.parquet", "--max-new-tokens", 12]
    assert command(*arguments, "-o", tmp_path / "out.jsonl").code == 0
    assert [(record["prompt"], record["answer"]) for record in read(tmp_path / "out.jsonl")] == [
        ("Emma", 1), ("Anne was", 2),
    ]  # fmt: skip
    columns["when"] = [datetime.date(2026, 1, day) for day in (1, 2)]
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "prompts.parquet")
    refused = command(*arguments, "-o", tmp_path / "other.jsonl")
    assert (refused.code, "prompts.parquet[0]: Object of type date is not JSON" in refused.err) == (2, True)


def test_a_disk_that_is_full_ends_the_command_and_the_same_command_goes_on(
    generate: Generate, small_windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(conversations(12), output="whole.jsonl").code == 0
    real, calls = os.fsync, iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) == 3:  # the sidecar, a window, the sidecar, and then this one
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    stopped = generate(conversations(12))
    assert stopped.code == 2
    assert "responses.jsonl cannot be written to: No space left on device; the same command goes on" in stopped.err
    assert generate(conversations(12)).code == 0
    assert (tmp_path / "responses.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_engine_that_gives_too_few_responses_is_named_and_closed(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[RolloutEngine] = []
    monkeypatch.setattr(TransformersRollout, "generate", lambda self, prompts, sampling: [])
    monkeypatch.setattr(TransformersRollout, "close", lambda self: closed.append(self))
    refused = generate(conversations(2))
    assert refused.code == 2
    assert "rollout engine 'transformers' gave 0 responses, not 1 to each of 2 prompts" in refused.err
    assert len(closed) == 1
    assert "The same command goes on where it stopped" in refused.err


CHAT = {"messages": [{"role": "user", "content": "Who?"}]}


@pytest.mark.parametrize(("lines", "options", "message"), [
    ([json.dumps(CHAT), "{"], [], "prompts.jsonl:2: this line is no JSON"),
    ([json.dumps(CHAT), "[1]"], [], "prompts.jsonl:2: a record must be a JSON object, not list"),
    (['{"text": "x"}'], [], "prompts.jsonl:1: a prompt needs the field 'messages' or 'prompt'; the record has text"),
    (['{"prompt": ""}'], [], "prompts.jsonl:1: 'prompt' must be text that is not empty"),
    (["", json.dumps(CHAT), '{"prompt": "x"}'], [],
     "prompts.jsonl:3: the record has 'prompt', and the first one 'messages': they are trained on as two files"),
    ([json.dumps({**CHAT, "answer": 1}), json.dumps(CHAT)], ["--keep", "verified"],
     "prompts.jsonl:2: to keep verified responses every record needs the field 'answer'"),
    (['{"prompt": "x", "teacher_prompt": ""}'], [],
     "prompts.jsonl:1: 'teacher_prompt' is empty; give it a text, or leave it out"),
    (['{"prompt": "x", "teacher_prompt": 3}'], [], "prompts.jsonl:1: 'teacher_prompt' must be text, not 3"),
    ([], [], "prompts.jsonl: the data file is empty"),
    ([json.dumps({"prompt": "x " * 600})], [], "512 positions of the model; leave the record out, or lower max_new"),
    ([json.dumps(CHAT)], ["--n", 2, "--temperature", 0], "at temperature 0 the 2 responses to a prompt are the same"),
    ([json.dumps(CHAT)], ["--top-p", 2], "sampling: top_p must be above 0 and at most 1, not 2.0"),
    ([json.dumps(CHAT)], ["--engine", "transformer"],
     "rollout engine 'transformer' is not registered; did you mean 'transformers'?"),
    ([json.dumps(CHAT)], ["--engine", "{name: transformers, batch_token: 3}"],
     "rollout engine 'transformers': batch_token: unknown key; did you mean 'batch_tokens'?"),
    ([json.dumps(CHAT)], ["--engine", "[1"], "--engine '[1' must be a name, or a mapping"),
    ([json.dumps(CHAT)], ["--engine", "{batch_tokens: 3}"], "--engine: name: this key is needed"),
    ([json.dumps(CHAT)], ["--checkpoint", "/absent"], "/absent holds no whole checkpoint"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    command: Command, write_run: WriteRun, tmp_path: Path, lines: list[str], options: list[object], message: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    result = command("generate", write_run(), "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "out.jsonl",
                     "--max-new-tokens", 12, *options)  # fmt: skip
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_missing_file_a_missing_teacher_and_an_output_that_cannot_be_written_are_refused(
    command: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [CHAT])
    absent = command("generate", write_run(), "--prompts", tmp_path / "absent.jsonl", "-o", tmp_path / "out.jsonl")
    assert (absent.code, "absent.jsonl: there is no such data file" in absent.err) == (2, True)
    (tmp_path / "file").touch()
    blocked = command("generate", write_run(), "--prompts", prompts, "-o", tmp_path / "file" / "out.jsonl",
                      "--max-new-tokens", 12)  # fmt: skip
    assert (blocked.code, "out.jsonl cannot be written to: " in blocked.err) == (2, True)
    alone = write_run(teacher=None, algorithm={"name": "sft"})
    result = command("generate", alone, "--prompts", prompts, "-o", tmp_path / "out.jsonl")
    assert (result.code, "names no teacher: add teacher.model, or give --checkpoint" in result.err) == (2, True)


def test_responses_without_text_are_never_written(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    """sft refuses them: there is nothing to learn."""
    directory = tmp_path / "silent"
    make_model(directory, tokenizer=make_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():  # the end of the sequence is the most likely token after everything
        model.get_input_embeddings().weight.zero_()
        model.model.norm.weight.zero_()
    model.save_pretrained(directory)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [CHAT])
    run = write_run(teacher={"model": str(directory)})
    # All logits are equal, and the first of the ids is special: text that is skipped.
    result = command("generate", run, "--prompts", prompts, "-o", tmp_path / "out.jsonl", "--temperature", 0,
                     "--max-new-tokens", 12)  # fmt: skip
    assert result.code == 0, result.err
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert table(result)["empty, left out"] == "1"
