"""Bad input is refused with exit code 2 and a message: what was given, where, what was expected, what to do.

Never a traceback, and never half a run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Command, Result, WriteRun, kdflow_process
from tests.support.models import make_model, make_tokenizer, write_jsonl


@dataclass
class Refusal:
    """What a run was refused with; ``text`` is the message without ``error: `` and without the test's directory."""

    text: str
    lines: list[str]


Refuse = Callable[..., Refusal]


def refused(result: Result, tmp_path: Path) -> Refusal:
    """Check what holds for every refusal."""
    assert result.code == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    text = result.err[result.err.index("error: ") + len("error: ") :].rstrip().replace(f"{tmp_path}/", "")
    assert not re.search(r"\w+(Error|Exception):|<class|object at 0x", text), text  # words for people
    return Refusal(text, text.splitlines())


@pytest.fixture
def refuse(command: Command, write_run: WriteRun, tmp_path: Path) -> Refuse:
    """Trains a run file with the given sections, and expects it to be refused with nothing half-written."""

    def call(*arguments: str, **sections: Any) -> Refusal:
        found = refused(command("train", write_run(**sections), *arguments), tmp_path)
        nothing_ran(tmp_path / "run")
        return found

    return call


def nothing_ran(output: Path) -> None:
    left = [path.name for path in output.rglob("*") if path.is_file()] if output.exists() else []
    assert left == []


def train_data(path: str, format: str = "text") -> dict[str, Any]:
    return {"train": [{"path": path, "format": format}]}


# --- the run file ----------------------------------------------------------------------------------------------------


def test_missing_run_file(command: Command, tmp_path: Path) -> None:
    found = refused(command("train", tmp_path / "absent.yaml"), tmp_path)
    assert found.text == "absent.yaml: there is no such run file"
    (tmp_path / "folder").mkdir()
    assert refused(command("train", tmp_path / "folder"), tmp_path).text == "folder: cannot be read: Is a directory"


@pytest.mark.parametrize(("text", "expected"), [
    ("student: {model: a\nseed: 1\n", "run.yaml:2: this is no YAML: expected ',' or '}', but got ':'"),
    ("student:\n\tmodel: a\n", "run.yaml:2: this is no YAML: found character '\\t' that cannot start any token"),
    ("seed: 1\nseed: 2\n", "run.yaml:2: the key 'seed' stands here and in line 1; keep one"),
    ("training:\n  steps: 1\n  seed: 2\n  steps: 3\n",
     "run.yaml:4: the key 'training.steps' stands here and in line 2; keep one"),
    ("", "run.yaml: a run file is a mapping with the keys student, teacher, algorithm, rollout, data, training, "
         "evaluation, tracking, plugins, output, seed"),
])  # fmt: skip
def test_a_run_file_that_is_none(command: Command, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert refused(command("train", tmp_path / "run.yaml"), tmp_path).text == expected


def line_of(tmp_path: Path, key: str) -> int:
    """Where ``key:`` first stands in the run file."""
    lines = (tmp_path / "run.yaml").read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(f"{key}:"))


@pytest.mark.parametrize(("sections", "key", "expected"), [
    ({"outputs": "x"}, "outputs", "outputs: unknown key; did you mean 'output'?"),
    ({"training": {"stpes": 4}}, "stpes", "training.stpes: unknown key; did you mean 'steps'?"),
    ({"algorithm": {"name": "jsd", "bta": 0.5}}, "bta", "algorithm.bta: unknown key; did you mean 'beta'? ('jsd')"),
    ({"training": {"steps": "many"}}, "steps",
     "training.steps: input should be a valid integer, unable to parse string as an integer, not 'many'"),
    ({"student": "a-model"}, "student",
     "student: must be a section with the keys model, keep_layers, lora, not 'a-model'"),
    ({"training": {"compile": "perhaps"}}, "compile",
     "training.compile: input should be a valid boolean, unable to interpret input, not 'perhaps'"),
    ({"training": {"learning_rate": -1.0}}, "learning_rate",
     "training.learning_rate: input should be greater than or equal to 0, not -1.0"),
    ({"algorithm": {"name": "jsd", "beta": 1.5}}, "beta",
     "algorithm.beta: input should be less than or equal to 1, not 1.5 ('jsd')"),
    ({"algorithm": {"name": "sft", "label_smoothing": 1}}, "label_smoothing",
     "algorithm.label_smoothing: input should be less than 1, not 1 ('sft')"),
    ({"student": {"keep_layers": "every third"}}, "keep_layers",
     "student.keep_layers: must be a slice such as '::3', or a list of layers, each of them once, not 'every third'"),
])  # fmt: skip
def test_a_key_at_fault(refuse: Refuse, tmp_path: Path, sections: dict[str, Any], key: str, expected: str) -> None:
    found = refuse(**sections)
    assert found.text == f"run.yaml:{line_of(tmp_path, key)}: {expected}"


def test_an_override_at_fault(refuse: Refuse) -> None:
    found = refuse("training.stepz=3")
    assert found.text == "override 'training.stepz=3': training.stepz: unknown key; did you mean 'steps'?"
    found = refuse("training.steps")
    assert found.text == "override 'training.steps' must be KEY=VALUE, such as training.steps=50"


def test_unknown_algorithm(refuse: Refuse, tmp_path: Path) -> None:
    found = refuse(algorithm={"name": "forward_lk"})
    assert found.text == (
        f"run.yaml:{line_of(tmp_path, 'algorithm') + 1}: algorithm.name: algorithm 'forward_lk' is not registered; "
        "did you mean 'forward_kl'? "
        "Installed: adaptive_kl, dskd, forward_kl, gkd, jsd, min_edit, overlap, reverse_kl, sft, skew_kl, "
        "skew_reverse_kl, sorted_l1, tvd, uld."
    )


@pytest.mark.parametrize(("algorithm", "expected"), [
    ({"name": "gkd", "divergence": "tvdd"}, "algorithm: divergence 'tvdd' is not registered; did you mean 'tvd'?"),
    ({"name": "overlap", "divergence": {"name": "jsd", "betta": 0.2}},
     "algorithm: divergence 'jsd': betta: unknown key; did you mean 'beta'?"),
    ({"name": "dskd", "divergence": {"beta": 0.2}},
     "algorithm.divergence: a section needs the key name, such as {name: jsd, beta: 0.3} ('dskd')"),
    ({"name": "min_edit", "divergence": {"name": "jsd", "temperature": 2.0}},
     "algorithm.divergence: temperature stands beside divergence, not in its section ('min_edit')"),
    ({"name": "gkd", "divergence": {"name": "tvd", "scale_by_temperature_squared": True}},
     "algorithm.divergence: scale_by_temperature_squared stands beside divergence, not in its section ('gkd')"),
    ({"name": "uld", "aligner": "byte_spam"},
     "algorithm: aligner 'byte_spam' is not registered; did you mean 'byte_span'?"),
])  # fmt: skip
def test_what_an_algorithm_looks_for_is_at_fault(
    refuse: Refuse, tmp_path: Path, algorithm: dict[str, Any], expected: str
) -> None:
    key = "divergence" if expected.startswith("algorithm.d") else "algorithm"
    assert refuse(algorithm=algorithm).text.startswith(f"run.yaml:{line_of(tmp_path, key)}: {expected}")


def test_captured_rows_are_not_of_what_the_student_writes(refuse: Refuse, tiny: dict[str, str]) -> None:
    found = refuse(algorithm={"name": "gkd"}, teacher={"model": tiny["teacher"], "engine": {"name": "cache"}})
    assert "teacher.engine: 'cache' holds rows of the run's data alone" in found.text


@pytest.mark.usefixtures("no_sglang")
def test_an_engine_that_is_not_installed(refuse: Refuse, tiny: dict[str, str]) -> None:
    found = refuse(teacher={"model": tiny["teacher"], "engine": {"name": "sglang"}})
    assert found.text.endswith("needs the package sglang, which is not installed: pip install 'kdflow[sglang]'")


def test_teacher_missing(refuse: Refuse) -> None:
    assert refuse(teacher=None).text == "run.yaml: algorithm 'forward_kl' needs a teacher: add teacher.model"


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_missing_model(refuse: Refuse, tmp_path: Path, side: str) -> None:
    found = refuse(**{side: {"model": str(tmp_path / "absent")}})
    assert "model not found: " in found.text
    assert "absent" in found.text
    assert "expected a directory with config.json and *.safetensors, or a hub id" in found.text


def test_a_model_that_no_hub_has(refuse: Refuse) -> None:
    found = refuse(student={"model": "nobody/no-such-model"})
    assert found.lines[0].startswith("model not found: 'nobody/no-such-model'")
    assert "give a local directory" in found.lines[-1]


def test_a_directory_that_holds_no_model(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "the directory 'empty' holds no config.json" in refuse(student={"model": str(tmp_path / "empty")}).text


def test_a_model_without_weights(refuse: Refuse, tiny: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    for file in Path(tiny["student"]).glob("*.json"):
        (tmp_path / "hollow" / file.name).write_bytes(file.read_bytes())
    found = refuse(student={"model": str(tmp_path / "hollow")})
    assert found.text.startswith("model hollow cannot be loaded as a causal language model: ")


def test_a_model_whose_config_is_no_json(refuse: Refuse, tiny: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for file in Path(tiny["student"]).iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "broken" / "config.json").write_text('{"model_type": ')
    assert "broken" in refuse(teacher={"model": str(tmp_path / "broken")}).text


@pytest.mark.parametrize(("layers", "kept"), [([0, 2], "[0, 2]"), ([-1], "[-1]"), ("5:", "[]")])
def test_layers_out_of_range(refuse: Refuse, layers: object, kept: str) -> None:
    found = refuse(student={"keep_layers": layers})
    assert found.text == f"student.keep_layers keeps {kept} of the layers 0 to 1; choose among these"


def test_different_vocabularies(refuse: Refuse, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(300, ["quite another text, with words of its own"] * 20)
    teacher = make_model(tmp_path / "foreign", tokenizer=tokenizer)
    found = refuse(teacher={"model": teacher})
    assert found.text.startswith("algorithm 'forward_kl' needs student and teacher to share a vocabulary, but ")
    assert f"the student's has 384 ids and the teacher's {len(tokenizer)}: id " in found.text
    assert "Choose a teacher of the student's family, or an algorithm between tokenizers" in found.text


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["train", "eval"])
def test_missing_data_file(refuse: Refuse, tmp_path: Path, which: str) -> None:
    found = refuse(data={which: [{"path": str(tmp_path / "absent.jsonl"), "format": "text"}]})
    assert found.text == "absent.jsonl: there is no such data file"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_path_that_no_disk_takes(refuse: Refuse, tmp_path: Path, streaming: bool) -> None:
    source = {"path": str(tmp_path / ("a" * 300)), "format": "text", "streaming": streaming}
    told = f"{'a' * 300} cannot be read: File name too long; mend it, or give another path"
    assert refuse(data={"train": [source]}).text == told
    found = refuse(data={"train": [{**source, "path": "a\0b"}]})
    assert found.text.endswith("data.train.0.path: must be a path, not 'a\\x00b'")


def test_a_cache_that_cannot_be_made(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path / "file" / "cache"))
    found = refuse()
    assert found.text == "file/cache/records cannot be made: Not a directory; mend it, or set KDFLOW_CACHE"


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_data_file(refuse: Refuse, tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    assert refuse(data=train_data(str(tmp_path / "data.jsonl"))).text == "data.jsonl: the data file is empty"


def test_a_data_file_that_is_no_text(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "\xe9t\xe9"}\n')
    told = "data.jsonl:1: this line is not UTF-8: byte 0xe9 at position 10; convert the file to UTF-8"
    assert refuse(data=train_data(str(tmp_path / "data.jsonl"))).text == told


GOOD = {
    "text": {"text": "A line of text that is long enough."},
    "prompt_response": {"prompt": "Why?", "response": "Because it is so."},
    "chat": {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
}  # fmt: skip


def missing(name: str, has: str) -> str:
    other = f"If another one holds it, name it in the source: fields: {{{name}: …}}"
    return f"the field '{name}' is missing; the record has {has}. {other}"


@pytest.mark.parametrize(("format", "line", "expected"), [
    ("text", '{"text": "cut off', "this line is no JSON: Unterminated string starting at (column 10)"),
    ("text", "text", "this line is no JSON: Expecting value (column 1)"),
    ("text", "{'text': 'x'}", "this line is no JSON: Expecting property name enclosed in double quotes (column 2)"),
    ("text", '["text"]', "a record must be a JSON object, not list"),
    ("text", '{"txt": "x", "id": 3}', missing("text", "id, txt")),
    ("text", "{}", missing("text", "no fields")),
    ("text", '{"text": 5}', "'text' must be text, not 5"),
    ("text", '{"text": ""}', "'text' is empty: there is nothing to learn"),
    ("prompt_response", '{"prompt": "Why?"}', missing("response", "prompt")),
    ("prompt_response", '{"response": "So."}', missing("prompt", "response")),
    ("prompt_response", '{"prompt": "Why?", "response": ""}', "'response' is empty: there is nothing to learn"),
    ("prompt_response", '{"prompt": null, "response": "So."}', "'prompt' must be text, not None"),
    ("chat", '{"text": "x"}', missing("messages", "text")),
    ("chat", '{"messages": "x"}', "'messages' must be a list, not 'x'"),
    ("chat", '{"messages": []}', "no turn has the role 'assistant': there is nothing to learn"),
    ("chat", '{"messages": ["x"]}', "message 1 must be an object with 'role' and 'content', not 'x'"),
    ("chat", '{"messages": [{"role": "user", "content": "x"}]}',
     "no turn has the role 'assistant': there is nothing to learn"),
    ("chat", '{"messages": [{"role": "robot", "content": "x"}]}',
     "message 1: the role must be one of system, user, assistant, tool, not 'robot'"),
    ("chat", '{"messages": [{"role": "assistant"}]}', "message 1: 'content' must be text, not None"),
    ("chat", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " \\n"}]}',
     "message 2, the assistant's, is empty"),
])  # fmt: skip
def test_a_line_at_fault(refuse: Refuse, tmp_path: Path, format: str, line: str, expected: str) -> None:
    """Lines are counted as an editor counts them, blank ones too."""
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(GOOD[format])}\n\n{line}\n", encoding="utf-8")
    assert refuse(data=train_data(str(tmp_path / "data.jsonl"), format)).text == f"data.jsonl:3: {expected}"


def test_a_text_that_no_tokenizer_can_read(refuse: Refuse, tmp_path: Path) -> None:
    """Half of a surrogate pair is JSON, but no text."""
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n{"text": "broken \\ud83d"}\n')
    found = refuse(data=train_data(str(tmp_path / "data.jsonl")))
    assert found.text.startswith("data.jsonl:2: ")
    assert r"'\ud83d' is half a surrogate pair" in found.text


def test_a_byte_order_mark_is_no_fault(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(GOOD['text'])}\n" * 3, encoding="utf-8-sig")
    assert command("train", write_run(data=train_data(str(tmp_path / "data.jsonl")), training={"steps": 1})).code == 0


def test_the_second_file_at_fault_is_the_one_that_is_named(
    refuse: Refuse, tiny: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "second.jsonl").write_text("{}\n")
    sources = [{"path": path, "format": "text"} for path in (tiny["train"], str(tmp_path / "second.jsonl"))]
    assert refuse(data={"train": sources}).text.startswith("second.jsonl:1: the field 'text' is missing")


def test_a_file_that_was_mended_is_read_again(
    refuse: Refuse, command: Command, write_run: WriteRun, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    refuse(data=train_data(str(data)), training={"steps": 1})
    write_jsonl(data, [GOOD["text"]] * 3)
    assert command("train", tmp_path / "run.yaml", f"output={tmp_path / 'other'}").code == 0


def no_trainable_tokens(write_run: WriteRun, tmp_path: Path) -> Path:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "word " * 400, "response": "Yes."}] * 3)
    return write_run(data=train_data(data, "prompt_response"))


def chat_without_a_template(write_run: WriteRun, tmp_path: Path) -> Path:
    plain = make_model(tmp_path / "plain", tokenizer=make_tokenizer(template=None))
    data = write_jsonl(tmp_path / "data.jsonl", [GOOD["chat"]])
    return write_run(student={"model": plain}, teacher={"model": plain}, data=train_data(data, "chat"))


@pytest.mark.parametrize(("fault", "expected"), [
    (no_trainable_tokens,
     "data.train: none of the 3 records can be used (data.jsonl:1: prompt too long); raise data.max_length"),
    (chat_without_a_template,
     "the format 'chat' needs a chat template, and the tokenizer of the student (plain) has none; use a model with a "
     "template, or the format prompt_response"),
])  # fmt: skip
def test_nothing_to_learn(
    command: Command, write_run: WriteRun, tmp_path: Path, fault: Callable[[WriteRun, Path], Path], expected: str
) -> None:
    assert refused(command("train", fault(write_run, tmp_path)), tmp_path).text == expected


@pytest.mark.parametrize("fault", [no_trainable_tokens, chat_without_a_template])
def test_nothing_to_learn_is_told_before_the_run_begins(
    command: Command, write_run: WriteRun, tmp_path: Path, fault: Callable[[WriteRun, Path], Path]
) -> None:
    refused(command("train", fault(write_run, tmp_path)), tmp_path)
    nothing_ran(tmp_path / "run")


def test_no_held_out_sample_that_fits(refuse: Refuse, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "eval.jsonl", [{"text": "word " * 400}] * 2)
    found = refuse(data={"eval": [{"path": data, "format": "text"}], "too_long": "drop"})
    assert found.text == "data.eval: none of the 2 records can be used (eval.jsonl:1: too long); raise data.max_length"


# --- the output ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["file", "proc"])
def test_output_not_writable(command: Command, write_run: WriteRun, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / "run" if below == "file" else Path("/proc/kdflow-run")
    found = refused(command("train", write_run(output=str(output))), tmp_path)
    assert re.fullmatch(r"output: (file/run|/proc/kdflow-run) cannot be written to: \w.+", found.text)
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_that_is_no_path(refuse: Refuse, tmp_path: Path) -> None:
    assert refuse("output=").text == "override 'output=': output: input should be a valid string, not None"
    assert refuse("output=''").text == "override 'output=''': output: must be a path, not ''"
    found = refuse(output="a\0b")
    assert found.text == f"run.yaml:{line_of(tmp_path, 'output')}: output: must be a path, not 'a\\x00b'"
    found = refuse(output=str(tmp_path / ("a" * 300)))
    assert found.text == f"output: {'a' * 300} cannot be written to: File name too long"


@pytest.mark.parametrize("arguments", [[], ["--resume", "auto"]])
def test_a_run_file_is_not_overwritten(
    command: Command, write_run: WriteRun, tmp_path: Path, arguments: list[str]
) -> None:
    run = write_run(output=str(tmp_path))
    before = run.read_text()
    found = refused(command("train", run, *arguments), tmp_path)
    assert found.text == "output: run.yaml is there already, and no run has written it: give another output"
    assert run.read_text() == before
    assert list(tmp_path.iterdir()) == [run]


def test_an_existing_run_is_not_overwritten(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(training={"steps": 1})
    assert command("train", run).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    found = refused(command("train", run), tmp_path)
    assert found.text.startswith("run holds a run already: go on with it by --resume auto, give another output, or ")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert command("train", run, "--resume", "auto").code == 0


def test_once_mended_the_same_command_works(
    command: Command, write_run: WriteRun, tiny: dict[str, str], tmp_path: Path
) -> None:
    run = write_run(data=train_data(str(tmp_path / "data.jsonl")), training={"steps": 1})
    refused(command("train", run), tmp_path)
    (tmp_path / "data.jsonl").write_bytes(Path(tiny["train"]).read_bytes())
    assert command("train", run).code == 0


# --- in a process of its own -----------------------------------------------------------------------------------------


def test_processes_exit_with_two_and_without_a_traceback(write_run: WriteRun, tmp_path: Path) -> None:
    """As a shell sees it: the run file, a line of data, a model."""
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(GOOD['text'])}\n{{\n")
    write_run()
    cases = [
        (["absent.yaml"], "error: absent.yaml: there is no such run file\n"),
        (["run.yaml", "data.train.0.path=data.jsonl"], "error: data.jsonl:2: this line is no JSON: "),
        (["run.yaml", "student.keep_layers=[7]"], "error: student.keep_layers keeps [7] of the layers 0 to 1;"),
    ]
    for number, (arguments, expected) in enumerate(cases):
        output = tmp_path / f"output-{number}"
        result = kdflow_process("train", *arguments, f"output={output}", cwd=tmp_path)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith(expected)
        assert "Traceback" not in result.err
        nothing_ran(output)
