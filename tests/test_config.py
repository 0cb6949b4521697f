"""The run file: YAML, typed and strict; every fault names the file, the line and the key."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import yaml

import kdflow
from kdflow import config, plugins
from kdflow.config import RunConfig
from kdflow.contracts import KdflowError
from kdflow.runtime.run_directory import RunDirectory
from kdflow.validation import validate_options
from tests.support.commands import site
from tests.support.distributions import plugin

__all__ = ["site"]

MINIMAL = """\
student: {model: student-model}
teacher: {model: teacher-model}
algorithm: {name: jsd, beta: 0.3}
data:
  train:
    - {path: train.jsonl, format: text}
    - {path: more.jsonl, format: chat}
training:
  steps: 5
  learning_rate: 1e-5
output: runs/one
"""

TRAIN = "  train:\n    - {path: train.jsonl, format: text}\n    - {path: more.jsonl, format: chat}\n"
installed = cache(plugins.load)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def load(path: Path, text: str = MINIMAL, overrides: list[str] | None = None) -> RunConfig:
    path.write_text(text, encoding="utf-8")
    return config.load(path, overrides or []).resolve(installed())


def fault(path: Path, text: str = MINIMAL, overrides: list[str] | None = None) -> str:
    """The message with which a run file is refused, its directory left out."""
    with pytest.raises(KdflowError) as caught:
        load(path, text, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{path.parent}/", "")


def minimal(old: str, new: str) -> str:
    assert MINIMAL.count(old) == 1
    return MINIMAL.replace(old, new)


# --- scalars ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [
    ("1e-5", 1e-5), ("1E-5", 1e-5), ("1.0e-5", 1e-5), ("+1e-5", 1e-5), (".5e-3", 5e-4), ("1.e-4", 1e-4), ("5e3", 5e3),
    ("1_000.5", 1000.5), ("0.1", 0.1), ("3", 3.0), ("'1e-5'", 1e-5),
])  # fmt: skip
def test_numbers(run: Path, text: str, value: float) -> None:
    assert load(run, minimal("1e-5", text)).training.learning_rate == value
    assert load(run, overrides=[f"training.learning_rate={text}"]).training.learning_rate == value


def test_a_path_may_begin_in_the_home_directory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    found = config.load(run, ["output=~/runs", "data.train.0.path=~/train.jsonl"]).config
    assert (found.output, found.data.train[0].path) == ("/home/somebody/runs", "/home/somebody/train.jsonl")


def test_integers(run: Path) -> None:
    assert load(run, overrides=["training.tokens_per_step=131_072"]).training.tokens_per_step == 131072
    assert load(run, overrides=["seed=0x10"]).seed == 16
    assert load(run, overrides=["training.steps=1e3"]).training.steps == 1000


@pytest.mark.parametrize(
    "text", ["2026-01-31", "2026-13-01", "no", "on", "1:30", "12:30:45", "0o17", "e5", "1e", "1.2.3"]
)
def test_words_that_older_yaml_takes_for_something_else(run: Path, text: str) -> None:
    assert load(run, minimal("runs/one", text)).output == text
    assert load(run, overrides=[f"output={text}"]).output == text


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("yes", True), ("off", False)])
def test_switches(run: Path, text: str, value: bool) -> None:
    assert load(run, overrides=[f"training.compile={text}"]).training.compile is value


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "1e999"])
def test_infinity_is_no_learning_rate(run: Path, text: str) -> None:
    message = fault(run, minimal("1e-5", text))
    assert message.startswith("run.yaml:10: training.learning_rate: input should be a finite number, not ")


# --- faults, with their lines ----------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(KdflowError, match=r"absent\.yaml: there is no such run file"):
        config.load(tmp_path / "absent.yaml")


def test_a_directory_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(KdflowError, match="cannot be read"):
        config.load(tmp_path)
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KdflowError, match=r"run\.yaml: cannot be read"):
        config.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(("text", "line"), [
    (minimal("{model: student-model}", "{model: student-model"), 2),
    (minimal("  steps: 5", "\tsteps: 5"), 9),
    (minimal("  steps: 5", "   steps: 5"), 10),
    (minimal("output: runs/one", "output: 'runs/one"), 12),
    (minimal("output: runs/one", "output: *nobody"), 11),
    (minimal("output: runs/one", "output: !!python/object/apply:os.getcwd []"), 11),
    (MINIMAL + "---\nseed: 1\n", 12),
])  # fmt: skip
def test_what_is_no_yaml_is_refused_with_its_line(run: Path, text: str, line: int) -> None:
    assert fault(run, text).startswith(f"run.yaml:{line}: this is no YAML: ")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_is_counted_as_an_editor_counts_it(run: Path, character: str) -> None:
    """To YAML these characters end a line, to editors they do not."""
    text = f"# one{character}# line\n{MINIMAL}"
    assert fault(run, text + "outputs: x\n").startswith("run.yaml:13: outputs: unknown key")
    assert fault(run, text + "seed: 1\nseed: 1\n").startswith("run.yaml:14: the key 'seed' stands here and in line 13")
    assert fault(run, text + "seed: *nobody\n").startswith("run.yaml:13: this is no YAML: ")


def test_characters_and_tags_that_yaml_does_not_take(run: Path) -> None:
    told = fault(run, minimal("output: runs/one", 'output: "runs/\x07one"'))
    assert told == "run.yaml:11: the character '\\x07' may not stand in YAML; take it out"
    assert "run.yaml: a value does not fit its tag: " in fault(run, minimal("  steps: 5", "  steps: !!int five"))


def test_an_alias_of_itself(run: Path) -> None:
    assert "alias" in fault(run, minimal("output: runs/one", "output: &a [*a]"))


@pytest.mark.parametrize("text", ["", "- 1\n", "only a text\n", "3\n"])
def test_a_file_that_is_no_mapping(run: Path, text: str) -> None:
    message = fault(run, text)
    assert message.startswith(
        "run.yaml: a run file is a mapping with the keys student, teacher, algorithm, rollout, data"
    )


@pytest.mark.parametrize(("text", "message"), [
    (MINIMAL + "seed: 1\nseed: 1\n", "run.yaml:13: the key 'seed' stands here and in line 12; keep one"),
    (minimal("  steps: 5", "  steps: 5\n  steps: 6"), "run.yaml:10: the key 'training.steps' stands here"),
    (minimal("{name: jsd, beta: 0.3}", "{name: jsd, name: tvd}"), "run.yaml:3: the key 'algorithm.name' stands here"),
    (minimal("{path: more.jsonl,", "{path: more.jsonl, path: x,"),
     "run.yaml:7: the key 'data.train.1.path' stands here"),
])  # fmt: skip
def test_a_key_that_stands_twice(run: Path, text: str, message: str) -> None:
    assert fault(run, text).startswith(message)


def test_the_same_key_in_two_sections_or_two_entries_is_none_that_stands_twice(run: Path) -> None:
    assert [source.path for source in load(run).data.train] == ["train.jsonl", "more.jsonl"]


@pytest.mark.parametrize(("text", "message"), [
    (MINIMAL + "outputs: x\n", "run.yaml:12: outputs: unknown key; did you mean 'output'?"),
    (minimal("  steps: 5", "  stpes: 5"), "run.yaml:9: training.stpes: unknown key; did you mean 'steps'?"),
    (minimal("student-model}", "student-model, keep_layer: 1}"),
     "run.yaml:1: student.keep_layer: unknown key; did you mean 'keep_layers'?"),
    (minimal("format: chat", "fromat: chat"), "run.yaml:7: data.train.1: unknown key 'fromat'; did you mean 'format'?"),
    (minimal("beta: 0.3", "bta: 0.3"), "run.yaml:3: algorithm.bta: unknown key; did you mean 'beta'?"),
    (minimal("beta: 0.3", "temprature: 2"),
     "run.yaml:3: algorithm.temprature: unknown key; did you mean 'temperature'?"),
    (minimal("teacher-model}", "teacher-model, engine: {name: transformers, tp: 2}}"),
     "run.yaml:2: teacher.engine.tp: unknown key; known keys: none"),
    (minimal("output:", "zzz: 1\noutput:"), "run.yaml:11: zzz: unknown key; known keys: student, teacher, algorithm"),
    (minimal("output:", "1: 2\noutput:"), "run.yaml:11: 1: unknown key; known keys: student"),
    (minimal("output:", "null: 2\noutput:"), "run.yaml:11: null: unknown key; known keys: student"),
    (minimal("beta: 0.3", "true: 2"), "run.yaml:3: algorithm.true: unknown key; known keys: "),
])  # fmt: skip
def test_an_unknown_key_is_told_the_nearest(run: Path, text: str, message: str) -> None:
    assert message in fault(run, text)


@pytest.mark.parametrize(("text", "message"), [
    (minimal("output: runs/one\n", ""), "run.yaml: output: this key is needed"),
    (minimal("{path: more.jsonl, format: chat}", "{path: more.jsonl}"),
     "run.yaml:7: data.train.1.format: this key is needed"),
    (minimal("{model: student-model}", "{}"), "run.yaml:1: student.model: this key is needed"),
    (minimal("{name: jsd, beta: 0.3}", "{beta: 0.3}"), "run.yaml:3: algorithm.name: this key is needed"),
])  # fmt: skip
def test_a_key_that_is_missing(run: Path, text: str, message: str) -> None:
    assert fault(run, text).startswith(message)


@pytest.mark.parametrize(("text", "message"), [
    (minimal("steps: 5", "steps: five"), "run.yaml:9: training.steps: input should be a valid integer"),
    (minimal("steps: 5", "steps: 5.5"), "run.yaml:9: training.steps: input should be a valid integer"),
    (minimal("steps: 5", "steps: [5]"), "run.yaml:9: training.steps: input should be a valid integer"),
    (minimal("1e-5", "fast"), "run.yaml:10: training.learning_rate: input should be a valid number"),
    (minimal("runs/one", "7"), "run.yaml:11: output: input should be a valid string, not 7"),
    (minimal("1e-5", "1e-5\n  compile: 7"), "run.yaml:11: training.compile: input should be a valid boolean"),
    (minimal("1e-5", "1e-5\n  dtype: float16"), "run.yaml:11: training.dtype: input should be 'bfloat16' or 'float32'"),
    (minimal("{name: jsd, beta: 0.3}", "jsd"),
     "run.yaml:3: algorithm: must be a section with the keys name, not 'jsd'"),
    (minimal("{path: train.jsonl, format: text}", "train.jsonl"),
     "run.yaml:6: data.train.0: must be a section with the keys path, format, config, split, revision, "
     "fields, weight, streaming, not 'train.jsonl'"),
    (minimal("{model: student-model}", "student-model"),
     "run.yaml:1: student: must be a section with the keys model, keep_layers, lora, not 'student-model'"),
    (MINIMAL + "plugins: {block: sft}\n", "run.yaml:12: plugins.block: input should be a valid list, not 'sft'"),
    (MINIMAL + "tracking: [console, 7]\n",
     "run.yaml:12: tracking.1: must be a tracker's name, or a section with its name and options, not 7"),
    (MINIMAL + "tracking:\n  - console\n  - {project: x}\n", "run.yaml:14: tracking.1.name: this key is needed"),
    (MINIMAL + "tracking: console\n", "run.yaml:12: tracking: input should be a valid list, not 'console'"),
    (minimal("beta: 0.3", "beta: much"), "run.yaml:3: algorithm.beta: input should be a valid number"),
])  # fmt: skip
def test_a_wrong_type(run: Path, text: str, message: str) -> None:
    assert fault(run, text).startswith(message)


@pytest.mark.parametrize(("text", "message"), [
    (minimal("steps: 5", "steps: 0"), "run.yaml:9: training.steps: input should be greater than or equal to 1, not 0"),
    (minimal("1e-5", "-1e-5"),
     "run.yaml:10: training.learning_rate: input should be greater than or equal to 0, not -1e-05"),
    (minimal("1e-5", "1e-5\n  warmup: 1.5"),
     "run.yaml:11: training.warmup: input should be less than or equal to 1, not 1.5"),
    (minimal("1e-5", "1e-5\n  betas: [0.9, 1]"), "run.yaml:11: training.betas: both must lie in [0, 1)"),
    (minimal("1e-5", "1e-5\n  clip_norm: 0"), "run.yaml:11: training.clip_norm: input should be greater than 0, not 0"),
    (MINIMAL + "seed: -1\n", "run.yaml:12: seed: input should be greater than or equal to 0, not -1"),
    (MINIMAL + f"seed: {2**64}\n", f"run.yaml:12: seed: input should be less than {2**63}, not {2**64}"),
    (minimal("beta: 0.3", "beta: 1.3"), "run.yaml:3: algorithm.beta: input should be less than or equal to 1, not 1.3"),
    (minimal("beta: 0.3", "temperature: 0"),
     "run.yaml:3: algorithm.temperature: input should be greater than or equal to 0.000001, not 0"),
    (minimal("beta: 0.3", "ce_weight: 2"),
     "run.yaml:3: algorithm.ce_weight: input should be less than or equal to 1, not 2"),
    (minimal("data:\n", "data:\n  max_length: 512\n  max_tokens: 256\n"),
     "run.yaml:4: data: max_length (512) must not exceed max_tokens (256)"),
    (minimal(TRAIN, "  train: []\n"),
     "run.yaml:5: data.train: list should have at least 1 item"),
])  # fmt: skip
def test_out_of_range(run: Path, text: str, message: str) -> None:
    assert fault(run, text).startswith(message)


def test_every_fault_is_told_at_once(run: Path) -> None:
    text = minimal("steps: 5", "steps: 0").replace("1e-5", "fast").replace("output: runs/one", "otput: x")
    message = fault(run, text)
    keys = ["training.steps", "training.learning_rate", "output", "otput"]
    assert [line.split(": ")[1] for line in message.splitlines()] == keys


@pytest.mark.parametrize(("text", "message"), [
    (minimal("name: jsd, beta: 0.3", "name: jds"),
     "run.yaml:3: algorithm.name: algorithm 'jds' is not registered; did you mean 'jsd'?"),
    (minimal("format: chat", "format: chatml"),
     "run.yaml:7: data.train.1.format: data format 'chatml' is not registered"),
    (MINIMAL + "tracking: [jsonl, wandb]\n", "run.yaml:12: tracking.1: tracker 'wandb' is not registered"),
    (MINIMAL + "tracking:\n  - name: jsonl\n  - name: json_l\n",
     "run.yaml:14: tracking.1: tracker 'json_l' is not registered; did you mean 'jsonl'?"),
    (minimal("teacher-model}", "teacher-model, engine: {name: vllm}}"),
     "run.yaml:2: teacher.engine.name: teacher engine 'vllm' is not registered. Installed: cache, sglang, "
     "transformers."),
])  # fmt: skip
def test_an_unknown_plugin(run: Path, text: str, message: str) -> None:
    assert fault(run, text).startswith(message)


# --- trackers --------------------------------------------------------------------------------------------------------

COUNTS = """
import kdflow
from kdflow.contracts import Tracker

class Counts(Tracker):
    name = "counts"
    class Options(kdflow.Options):
        label: str
        every: int = 10
    def start(self, directory, run, first_step):
        self.file = (directory / "counts.txt").open("a")
        print(run["tracking"], file=self.file)
    def event(self, event):
        if event["event"] == "step" and event["step"] % self.options.every == 0:
            print(self.options.label, event["step"], file=self.file)
    def close(self):
        self.file.close()

@kdflow.hookimpl
def kdflow_trackers():
    return [Counts]
"""


@pytest.fixture
def counts(site: Path) -> plugins.Plugins:
    plugin("kdflow_counts", COUNTS).install(site)
    return plugins.load()


def test_a_tracker_is_its_name_or_a_section_with_its_options(run: Path, counts: plugins.Plugins) -> None:
    run.write_text(MINIMAL + "tracking: [console, {name: jsonl}, {name: counts, label: x}]\n", encoding="utf-8")
    resolved = config.load(run, ["tracking.2.every=5"]).resolve(counts)
    # What has no options is written as it was always written: by its name.
    assert resolved.as_dict()["tracking"] == ["console", "jsonl", {"name": "counts", "label": "x", "every": 5}]
    run.write_text(resolved.as_yaml(), encoding="utf-8")
    assert config.load(run).resolve(counts) == resolved


@pytest.mark.parametrize(("tracking", "message"), [
    ("[{name: counts, label: x, evry: 5}]",
     "run.yaml:12: tracking.0.evry: unknown key; did you mean 'every'? ('counts')"),
    ("\n  - console\n  - name: counts\n    label: x\n    every: often",
     "run.yaml:16: tracking.1.every: input should be a valid integer"),
    ("[counts]", "run.yaml:12: tracking.0.label: this key is needed ('counts')"),
    ("[{name: console, width: 80}]", "run.yaml:12: tracking.0.width: unknown key; known keys: none ('console')"),
    ("[console, jsonl, console]", "run.yaml:12: tracking.2: tracker 'console' stands here a second time; keep one"),
])  # fmt: skip
def test_options_of_a_tracker_that_do_not_fit(run: Path, counts: plugins.Plugins, tracking: str, message: str) -> None:
    run.write_text(f"{MINIMAL}tracking: {tracking}\n", encoding="utf-8")
    with pytest.raises(KdflowError) as caught:
        config.load(run).resolve(counts)
    assert str(caught.value).replace(f"{run.parent}/", "").startswith(message)


class Part(kdflow.Options):
    weight: int = 1


class Nested(kdflow.Options):
    parts: dict[str, Part] | None = None
    one: Part | list[Part] | None = None
    pairs: tuple[Part, ...] = ()


@pytest.mark.parametrize(("options", "message"), [
    ({"parts": {"a": {"wieght": 2}}}, "parts.a.wieght: unknown key; did you mean 'weight'?"),
    ({"parts": {"a": 2}}, "parts.a: must be a section with the keys weight, not 2"),
    ({"one": {"wieght": 2}}, "one.Part.wieght: unknown key; did you mean 'weight'?"),
    ({"one": [{"wieght": 2}]}, "one.list[Part].0.wieght: unknown key; did you mean 'weight'?"),
    ({"pairs": [{"much": 2}]}, "pairs.0.much: unknown key; known keys: weight"),
])  # fmt: skip
def test_options_inside_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KdflowError) as caught:
        validate_options(Nested, options, "")
    assert message in str(caught.value).splitlines()


def test_a_tracker_of_a_run_has_its_options(
    counts: plugins.Plugins, run_file: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tracking = [{"name": "counts", "label": "at", "every": 2}]
    output = kdflow.train(run_file(tracking=tracking)).output
    assert (output / "counts.txt").read_text().splitlines() == [str(tracking), "at 2", "at 4"]


# --- booleans are not numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["seed=true", "training.steps=true", "training.learning_rate=false"])
def test_a_boolean_is_no_number(run: Path, override: str) -> None:
    message = fault(run, overrides=[override])
    assert override.partition("=")[0].rpartition(".")[2] in message
    assert message.endswith(f"must be a number, not {override.partition('=')[2]}")


def test_a_boolean_is_no_option_that_is_a_number(run: Path) -> None:
    message = fault(run, minimal("beta: 0.3", "beta: true"))
    assert message.startswith("run.yaml:3: algorithm")
    assert "beta" in message
    assert "must be a number, not true" in message


@pytest.mark.parametrize("override", [
    "training.checkpoint_every=true", "training.clip_norm=true", "training.head_chunk=true",
    "training.evaluate_every=true", "training.betas=[true, 0.5]",
])  # fmt: skip
def test_a_boolean_is_no_number_where_null_is_allowed_or_in_a_list(run: Path, override: str) -> None:
    assert "must be a number" in fault(run, overrides=[override])


class Linear(kdflow.Options):
    kind: Literal["linear"] = "linear"
    steps: int = pydantic.Field(10, ge=1)


class Constant(kdflow.Options):
    kind: Literal["constant"] = "constant"


class Scheduled(kdflow.Options):
    schedule: Linear | Constant = pydantic.Field(Linear(), discriminator="kind")


def test_a_field_may_tell_the_members_of_a_union_apart() -> None:
    assert validate_options(Scheduled, {"schedule": {"kind": "constant"}}, "").schedule == Constant()
    with pytest.raises(KdflowError, match=r"^schedule\.linear\.steps: must be a number, not true$"):
        validate_options(Scheduled, {"schedule": {"kind": "linear", "steps": True}}, "")


# --- keep_layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["'::3'", "':10'", "'2:'", "':'", "'-4:'", "0:30:2", "1:30", "[0, 3, 5]", "[0, -1]", "null"]
)
def test_layers_to_keep(run: Path, value: str) -> None:
    expected = yaml.safe_load(value) if value != "1:30" else value
    assert load(run, overrides=[f"student.keep_layers={value}"]).student.keep_layers == expected


@pytest.mark.parametrize("value", [
    "'::0'", "'::-1'", "'::-'", "'-:'", "'3'", "'1:2:3:4'", "'a:b'", "''", "3", "[]", "[1, 1]", "[1, '2']", "[true]",
    "[1.5]", "true", "{a: 1}",
])  # fmt: skip
def test_layers_that_cannot_be_kept(run: Path, value: str) -> None:
    message = fault(run, overrides=[f"student.keep_layers={value}"])
    assert message.startswith(
        f"override 'student.keep_layers={value}': student.keep_layers: must be a slice such as '::3'"
    )
    assert len(message.splitlines()) == 1


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides(run: Path) -> None:
    changed = load(run, overrides=[
        "training.steps=7", "algorithm.temperature=2.5", "data.train.1.path=other.jsonl", "data.max_tokens=8192",
        "output=runs/a=b", "tracking=[jsonl]", "teacher.engine={name: transformers}", "student.keep_layers='::2'",
        "data.train.0={path: third.jsonl, format: prompt_response}", "training.clip_norm=null", "training.steps=8",
    ])  # fmt: skip
    assert changed.training.steps == 8  # the last one counts
    assert changed.algorithm.options()["temperature"] == 2.5
    assert changed.algorithm.options()["beta"] == 0.3
    assert [source.path for source in changed.data.train] == ["third.jsonl", "other.jsonl"]
    assert [source.format for source in changed.data.train] == ["prompt_response", "chat"]
    assert changed.data.max_tokens == 8192
    assert changed.output == "runs/a=b"
    assert [tracker.name for tracker in changed.tracking] == ["jsonl"]
    assert changed.student.keep_layers == "::2"
    assert changed.training.clip_norm is None


def test_an_override_may_open_a_section_or_take_one_out(run: Path) -> None:
    changed = load(run, overrides=["plugins.block=[sft]", "teacher=null"])
    assert changed.plugins.block == ["sft"]
    assert changed.teacher is None


def test_an_override_changes_one_place_though_an_alias_repeats_the_value(run: Path) -> None:
    text = minimal(TRAIN, "  eval: &files\n    - {path: e.jsonl, format: text}\n  train: *files\n")
    assert load(run, text).data.train == load(run, text).data.eval
    changed = load(run, text, ["data.train.0.path=t.jsonl"])
    assert (changed.data.train[0].path, changed.data.eval[0].path) == ("t.jsonl", "e.jsonl")


def test_an_override_opens_a_section_that_a_run_directory_writes_out_as_null(run: Path) -> None:
    changed = load(run, MINIMAL + "rollout: null\n", ["rollout.fraction=0.5"])
    assert changed.rollout is not None
    assert changed.rollout.fraction == 0.5


@pytest.mark.parametrize(("override", "message"), [
    ("training.steps", "override 'training.steps' must be KEY=VALUE, such as training.steps=50"),
    ("=5", "override '=5' must be KEY=VALUE"),
    ("", "override '' must be KEY=VALUE"),
    ("training.steps.more=5", "override 'training.steps.more=5': 'steps' holds a value, not a section"),
    ("data.train.2.path=x", "override 'data.train.2.path': '2' must be a number below 2"),
    ("data.train.-1.path=x", "override 'data.train.-1.path': '-1' must be a number below 2"),
    ("data.train.first.path=x", "override 'data.train.first.path': 'first' must be a number below 2"),
    ("data.train.².path=x", "override 'data.train.².path': '²' must be a number below 2"),
    ("data.train.2=x", "override 'data.train.2': '2' must be a number below 2"),
    ("tracking=[", "override 'tracking=[': the value is no YAML"),
    ("training={steps: 3, steps: 9}", "override 'training={steps: 3, steps: 9}': the value is no YAML: the key 'steps' "
     "stands twice; keep one"),
    ("training=&a {steps: *a}", "override 'training=&a {steps: *a}': the value is no YAML: an alias"),
    ("training={null: 9}", "override 'training={null: 9}': training.null: unknown key"),
    ("output=*nobody", "override 'output=*nobody': the value is no YAML"),
    ("training.stepz=5", "override 'training.stepz=5': training.stepz: unknown key; did you mean 'steps'?"),
    ("trainning.steps=5", "override 'trainning.steps=5': trainning: unknown key; did you mean 'training'?"),
    ("training.steps=-1", "override 'training.steps=-1': training.steps: input should be greater than or equal to 1"),
    ("seed=", "override 'seed=': seed: input should be a valid integer, not None"),
    ("training={steps: x}", "override 'training={steps: x}': training.steps: input should be a valid integer"),
    ("algorithm.name=jds", "override 'algorithm.name=jds': algorithm.name: algorithm 'jds' is not registered"),
    ("student.lora=8", "override 'student.lora=8': student.lora: must be a section with the keys rank, alpha, dropout, "
     "targets, not 8"),
    ("student.lora.rnk=8", "override 'student.lora.rnk=8': student.lora.rnk: unknown key; did you mean 'rank'?"),
    ("student.lora.targets=q_proj", "override 'student.lora.targets=q_proj': student.lora.targets: must be all-linear, "
     "or a list of layers such as [q_proj, v_proj], not 'q_proj'"),
    ("training.activation_checkpointing=0", "override 'training.activation_checkpointing=0': "
     "training.activation_checkpointing: must be true, false, or k, at least 1, for every k-th block, not 0"),
    ("training.optimizer=adam", "override 'training.optimizer=adam': training.optimizer: input should be 'adamw' or "
     "'adamw_8bit', not 'adam'"),
    ("algorithm.beta=3", "override 'algorithm.beta=3': algorithm.beta: input should be less than or equal to 1, not 3"),
])  # fmt: skip
def test_bad_overrides(run: Path, override: str, message: str) -> None:
    assert fault(run, overrides=[override]).startswith(message)


@pytest.mark.parametrize(("override", "whole"), [
    ("data.eval.0.path=x", "data.eval=[{path: x}]"), ("tracking.0=jsonl", "tracking=[jsonl]"),
])  # fmt: skip
def test_an_override_of_an_entry_of_an_empty_list_is_told_how_to_give_it(run: Path, override: str, whole: str) -> None:
    key, section = override.partition("=")[0], whole.partition("=")[0]
    told = f"override '{key}': {section} is an empty list; give it whole, such as '{whole}'"
    assert fault(run, overrides=[f"{section}=[]", override]) == told
    load(run, overrides=[f"{section}=[]", whole.replace("path: x", "path: x, format: text")])


def test_a_fault_beside_an_override_is_still_told_with_its_line(run: Path) -> None:
    message = fault(run, minimal("1e-5", "fast"), ["training.steps=6"])
    assert message.startswith("run.yaml:10: training.learning_rate: ")


# --- mappings --------------------------------------------------------------------------------------------------------


def test_a_mapping_is_a_run_file_too_and_is_left_as_it_is() -> None:
    run: dict[str, Any] = yaml.safe_load(MINIMAL)
    before = yaml.safe_dump(run)
    found = config.load(run, ["training.steps=6", "data.train.0.path=x", "seed=3"])
    assert (found.config.training.steps, found.config.data.train[0].path, found.config.seed) == (6, "x", 3)
    assert yaml.safe_dump(run) == before
    with pytest.raises(KdflowError, match=r"^run: student\.model: this key is needed$"):
        config.load({**run, "student": {}})


# --- a share that an algorithm asks for ------------------------------------------------------------------------------

SHARE = """
import kdflow
from kdflow.contracts import LossSum

class Share(kdflow.Algorithm):
    name = "share"
    class Options(kdflow.Options):
        on_policy: float | None = None
    def loss(self, student, teacher, batch):
        return LossSum(student.rows.sum())

@kdflow.hookimpl
def kdflow_algorithms():
    return [Share]
"""


@pytest.fixture
def share(site: Path) -> plugins.Plugins:
    plugin("kdflow_share", SHARE).install(site)
    return plugins.load()


@pytest.mark.parametrize(("overrides", "expected"), [
    ([], None), (["rollout.n=2"], 1.0), (["algorithm.on_policy=0.25"], 0.25), (["rollout.fraction=0.5"], 0.5),
])  # fmt: skip
def test_a_share_that_may_be_left_open(
    run: Path, share: plugins.Plugins, overrides: list[str], expected: float | None
) -> None:
    resolved = config.load(run, ["algorithm={name: share}", *overrides]).resolve(share)
    assert resolved.algorithm.options() == {"on_policy": expected}
    assert (resolved.rollout and resolved.rollout.fraction) == expected
    run.write_text(resolved.as_yaml(), encoding="utf-8")
    assert config.load(run).resolve(share) == resolved


@pytest.mark.parametrize("asked", ["50", "-0.5"])
def test_a_share_that_is_none(run: Path, share: plugins.Plugins, asked: str) -> None:
    with pytest.raises(KdflowError) as caught:
        config.load(run, ["algorithm={name: share}", f"algorithm.on_policy={asked}"]).resolve(share)
    told = f"algorithm.on_policy: must be a share of the samples, from 0 to 1, or null, not {float(asked)} ('share')"
    assert told in str(caught.value)


# --- what is written down --------------------------------------------------------------------------------------------


def test_every_default_is_written_out(run: Path) -> None:
    source = {
        "config": None, "split": "train", "revision": None, "fields": {}, "weight": 1.0, "streaming": False,
    }  # fmt: skip
    assert load(run).as_dict() == {
        "student": {"model": "student-model", "keep_layers": None, "lora": None},
        "teacher": {"model": "teacher-model", "engine": {"name": "transformers"}, "follow": None, "sleep": None},
        "rollout": None,
        "algorithm": {
            "name": "jsd", "beta": 0.3, "temperature": 1.0, "scale_by_temperature_squared": False, "ce_weight": 0.0,
        },
        "data": {
            "train": [
                {"path": "train.jsonl", "format": "text", **source},
                {"path": "more.jsonl", "format": "chat", **source, "system": None,
                 "learn": ["assistant"], "turns": "all"},
            ],
            "eval": [], "max_length": 4096, "too_long": "truncate", "max_tokens": 4096, "on_error": "stop",
            "workers": None,
        },
        "training": {
            "steps": 5, "epochs": None, "tokens_per_step": 131072, "learning_rate": 1e-5, "schedule": "cosine",
            "warmup": 0.03, "weight_decay": 0.0, "betas": [0.9, 0.95], "clip_norm": 1.0, "dtype": "bfloat16",
            "compile": False,
            "activation_checkpointing": False, "head_chunk": None, "checkpoint_every": 200, "keep_checkpoints": 3,
            "parameters": "float32", "optimizer": "adamw",
            "evaluate_every": 100,
            "replicas": 1,
        },
        "evaluation": [],
        "tracking": ["console", "jsonl"],
        "plugins": {"block": []},
        "output": "runs/one",
        "seed": 0,
    }  # fmt: skip


def test_every_key_is_documented_in_the_code() -> None:
    """The reference is made of these; --json and editors show them."""
    undocumented = [
        f"{section}.{name}"
        for section in ("student", "teacher", "data", "training", "plugins")
        for name, field in _model(section).model_fields.items()
        if not field.description
    ]
    assert undocumented == ["data.train", "training.learning_rate"]  # what they are goes without saying


def _model(section: str) -> Any:
    annotation: Any = RunConfig.model_fields[section].annotation
    return next(kind for kind in (annotation, *getattr(annotation, "__args__", ())) if hasattr(kind, "model_fields"))


@pytest.mark.parametrize("overrides", [
    [], ["training.learning_rate=3e-7", "training.clip_norm=null", "student.keep_layers=[0, 2]", "seed=12345678901"],
    ["algorithm={name: sft, label_smoothing: 1e-3}", "teacher=null", "plugins.block=[jsd]"],
    ["output='1e5'", "student.model='007'", "teacher.model='null'"], ["output='12e4567'"], ["output=2026-01-31"],
    ["output='no'"], ["output='1:30'"], ["output='ü: [x] # y'"], ["output='*a'"], ["student.keep_layers=1:30"],
])  # fmt: skip
def test_a_run_file_survives_being_written(run: Path, overrides: list[str]) -> None:
    resolved = load(run, overrides=overrides)
    again = load(run, resolved.as_yaml())
    assert again == resolved
    assert again.as_yaml() == resolved.as_yaml()
    assert yaml.safe_load(resolved.as_yaml())["output"] == resolved.output  # also for programs with another YAML


def test_the_run_directory_keeps_a_run_file(run: Path, tmp_path: Path) -> None:
    resolved = load(run, overrides=["training.learning_rate=3e-7", "student.keep_layers='::2'"])
    RunDirectory(tmp_path).describe(resolved, installed())
    assert config.load(tmp_path / "run.yaml").resolve(installed()) == resolved


def test_the_run_directory_keeps_a_run_file_whose_output_looks_like_a_number(run: Path, tmp_path: Path) -> None:
    resolved = load(run, overrides=["output='1e5'"])
    RunDirectory(tmp_path).describe(resolved, installed())
    assert config.load(tmp_path / "run.yaml").resolve(installed()) == resolved
