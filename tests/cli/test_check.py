"""``kdflow check``: what a run will do and need, before it takes a device."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import kdflow
from tests.support.architectures import make_config
from tests.support.commands import Command, Result, site
from tests.support.distributions import plugin
from tests.support.models import rename_token, texts, write_jsonl
from tests.support.runs import saved

__all__ = ["site"]

RunFile = Callable[..., dict[str, Any]]


@pytest.fixture
def check(command: Command, run_file: RunFile, tmp_path: Path) -> Callable[..., Result]:
    """Write a run file, and check it."""

    def run(*arguments: str, **sections: Any) -> Result:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_file(**sections)))
        return command("check", str(tmp_path / "run.yaml"), *arguments)

    return run


def as_json(result: Result, code: int = 0) -> dict[str, Any]:
    assert result.code == code, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_models_are_counted_without_their_weights(check: Callable[..., Result], tiny: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    found = as_json(check("--json", student={"model": tiny["teacher"], "keep_layers": "::2"}))
    assert found["models"]["teacher"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["models"]["student"]["layers"] == 2
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert found["models"]["student"]["parameters"] == found["models"]["teacher"]["parameters"] - block


def test_no_weight_is_read(check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(tiny["student"]).iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert as_json(check("--json", student={"model": str(bare)}))["problems"] == []


def test_data_batches_and_epochs(check: Callable[..., Result], tiny: dict[str, str]) -> None:
    found = as_json(check("--json", training={"epochs": 2, "steps": None}))
    (source,) = found["data"]["train"]
    assert source["records"] == source["looked_at"] == 48
    lengths = list(source["tokens"].values())
    assert lengths == sorted(lengths)
    assert lengths[0] > 0
    assert lengths[-1] <= 128
    batches = found["batches"]
    assert batches["samples_per_step"] == pytest.approx(400 / source["mean_tokens"])
    assert batches["steps_per_epoch"] == pytest.approx(48 / batches["samples_per_step"])
    assert batches["steps"] == pytest.approx(2 * batches["steps_per_epoch"], abs=0.51)


def test_memory_follows_what_the_run_says(check: Callable[..., Result]) -> None:
    one = as_json(check("--json"))["memory"]
    assert one["bytes"]["total"] == sum(value for key, value in one["bytes"].items() if key != "total")
    two = as_json(check("--json", "--devices", "2"))["memory"]["bytes"]
    assert two["optimizer"] == one["bytes"]["optimizer"] // 2
    assert two["teacher"] == one["bytes"]["teacher"]
    saved = as_json(check("--json", training={"activation_checkpointing": True}))["memory"]["bytes"]
    assert saved["activations"] < one["bytes"]["activations"]
    wider = as_json(check("--json", data={"max_tokens": 512}))["memory"]["bytes"]
    assert wider["activations"] == pytest.approx(2 * one["bytes"]["activations"], rel=0.05)
    chunked = as_json(check("--json", training={"head_chunk": 8}))["memory"]["bytes"]
    assert chunked["head"] < one["bytes"]["head"]


def test_memory_follows_what_is_trained_and_in_what(check: Callable[..., Result], tiny: dict[str, str]) -> None:
    whole = as_json(check("--json"))
    lora = {"model": tiny["student"], "lora": {"rank": 4, "targets": ["q_proj", "down_proj"]}}
    adapted = as_json(check("--json", student=lora))
    config = AutoModelForCausalLM.from_pretrained(tiny["student"]).config
    hidden, inner = config.hidden_size, config.intermediate_size
    assert adapted["models"]["student"]["trained"] == 4 * config.num_hidden_layers * (hidden + hidden + hidden + inner)
    assert adapted["memory"]["bytes"]["optimizer"] == 8 * adapted["models"]["student"]["trained"]
    assert adapted["memory"]["checkpoints_on_disk"] < whole["memory"]["checkpoints_on_disk"] / 2
    half = as_json(check("--json", training={"parameters": "bfloat16"}))["memory"]
    assert half["bytes"]["optimizer"] == whole["memory"]["bytes"]["optimizer"] // 2
    assert half["checkpoints_on_disk"] == whole["memory"]["checkpoints_on_disk"] // 2
    small = as_json(check("--json", training={"optimizer": "adamw_8bit"}))["memory"]["bytes"]
    assert small["optimizer"] == whole["memory"]["bytes"]["optimizer"] // 4
    every = [as_json(check("--json", training={"activation_checkpointing": k}))["memory"]["bytes"] for k in (1, 2)]
    assert every[0]["activations"] < every[1]["activations"] < whole["memory"]["bytes"]["activations"] * 1.2


def test_the_sample_shows_what_is_learnt_on_both_sides(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "What? ", "response": "That."}))
    data = {"train": [{"path": str(path), "format": "prompt_response"}]}
    found = as_json(check("--json", data=data))
    for side in ("student", "teacher"):
        assert [part["learnt"] for part in found["sample"][side]] == [False, True]
        assert found["sample"][side][0]["text"] == "What? "
        assert found["sample"][side][1]["text"].startswith("That.")
    shown = check(data=data).out
    assert "What? ⟦That." in shown
    assert f"{path}:1 as the teacher sees it" in shown


def test_the_page_has_everything(check: Callable[..., Result]) -> None:
    result = check(algorithm={"name": "jsd", "beta": 0.25})
    assert result.code == 0
    for text in ("jsd beta=0.25, temperature=1.0, scale_by_temperature_squared=False, ce_weight=0.0", "parameters",
                 "responses end with", "the vocabularies are the same", "optimizer states",
                 "checkpoints on disk", "nothing stands in the way of this run",
                 f"torch {torch.__version__}", "schedule: cosine, warmup: 0.03", "tracking   │ [jsonl]"):  # fmt: skip
        assert text in result.out
    for section in as_json(check("--json"))["run"].values():
        for option in section if isinstance(section, dict) else ():
            assert f"{option}: " in result.out or option in ("train", "eval")


def test_a_narrow_terminal_shows_the_figures(check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    memory = check().out.partition("memory")[2]
    assert len(re.findall(r"│ \d+\.\d\d", memory)) >= 8
    monkeypatch.setenv("COLUMNS", "79")
    assert "│ parameters, and those that it computes with" in check().out, "no name is cut where there is room"


def test_special_tokens_that_differ_are_told(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path
) -> None:
    renamed = rename_token(tiny["teacher"], tmp_path / "renamed", "<|im_start|>", "<|turn|>")
    teacher = {"model": renamed}
    told = "an added token differs, id 1: '<|im_start|>' to the student and '<|turn|>' to the teacher"
    assert f"the vocabularies are the same, but {told}" in " ".join(check(teacher=teacher).out.split())
    vocabulary = as_json(check("--json", teacher=teacher))["tokenizers"]["vocabulary"]
    assert vocabulary["same"]
    assert vocabulary["renaming"] == told
    assert vocabulary["renamed"] == {"1": ["<|im_start|>", "<|turn|>"]}
    assert (vocabulary["shared"], vocabulary["shared_ids"], vocabulary["shared_tokens"]) == (384, 383, 381)
    assert vocabulary["roles"]["eos"] == ["<|im_end|>", "<|im_end|>"]


def test_every_problem_is_told_and_the_exit_code_says_so(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    result = check(data={"train": [{"path": str(broken), "format": "text"}]}, student={"model": "nobody/nothing"})
    assert result.code == 2
    assert "run.yaml is there already, and no run has written it: give another output" in result.out
    assert "nobody/nothing" in result.out
    found = as_json(check("--json", data={"train": [{"path": str(broken), "format": "text"}]}), code=2)
    assert [problem for problem in found["problems"] if "broken.jsonl:2: 'text' must be text" in problem]


def test_one_missing_file_hides_neither_the_next_nor_a_missing_model(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    absent, empty = (str(tmp_path / f"{name}.jsonl") for name in ("absent", "empty"))
    data = {"train": [{"path": path, "format": "text"} for path in (absent, tiny["train"])],
            "eval": [{"path": empty, "format": "text"}]}  # fmt: skip
    told = [f"{absent}: there is no such data file", f"{empty}: the data file is empty"]
    found = as_json(check("--json", data=data), code=2)
    assert found["problems"] == told
    assert [source["path"] for source in found["data"]["train"]] == [tiny["train"]]
    assert "batches" not in found
    both = check("--json", data=data, student={"model": "./nope"}, teacher={"model": "./nope"})
    model, *others = as_json(both, code=2)["problems"]
    assert model.startswith("model not found: './nope'")  # told once, although two sides and two parts need it
    assert others == told


def test_a_stream_without_records_is_a_problem(check: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    train = [{"path": str(tmp_path / "empty.jsonl"), "format": "text", "streaming": True}]
    found = as_json(check("--json", data={"train": train}), code=2)
    assert found["problems"] == [f"{tmp_path / 'empty.jsonl'}: the data file is empty"]


def test_an_output_that_cannot_be_written_to_is_a_problem(check: Callable[..., Result], tmp_path: Path) -> None:
    output = tmp_path / "run.yaml" / "run"
    (problem,) = as_json(check("--json", output=str(output)), code=2)["problems"]
    assert problem == f"output: {output} cannot be written to: {tmp_path / 'run.yaml'} is a file"


def test_an_output_that_train_would_refuse_is_a_problem(
    check: Callable[..., Result], command: Command, tmp_path: Path
) -> None:
    long = tmp_path / ("a" * 300)
    (problem,) = as_json(check("--json", output=str(long)), code=2)["problems"]
    assert problem == f"output: {long} cannot be written to: File name too long"
    (problem,) = as_json(check("--json", output=str(tmp_path)), code=2)["problems"]
    assert problem.startswith(f"output: {tmp_path / 'run.yaml'} is there already")
    assert check(training={"steps": 1}).code == 0
    assert command("train", tmp_path / "run.yaml").code == 0
    (problem,) = as_json(check("--json"), code=2)["problems"]
    assert problem.startswith(f"{tmp_path / 'run'} holds a run already: go on with it by --resume auto")


def test_records_that_cannot_be_used_are_counted(check: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n{}\n')
    data = {"train": [{"path": str(tmp_path / "data.jsonl"), "format": "text"}]}
    (problem,) = as_json(check("--json", data=data), code=2)["problems"]
    assert problem.endswith("and 1 more of the 3 records looked at; data.on_error=skip leaves out what cannot be used")
    assert as_json(check("--json", data={**data, "on_error": "skip"}))["problems"] == []


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize(("record", "why"), [
    ({"text": 3}, r"data\.jsonl:1: 'text' must be text, not 3\)"),
    ({"text": "word " * 400}, r"data\.jsonl:1: too long\); raise data\.max_length"),
])  # fmt: skip
def test_data_of_which_nothing_can_be_used_is_a_problem(
    check: Callable[..., Result], tmp_path: Path, part: str, record: dict[str, Any], why: str
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [record] * 3)
    data = {part: [{"path": path, "format": "text"}], "on_error": "skip", "too_long": "drop"}
    (problem,) = as_json(check("--json", data=data), code=2)["problems"]
    assert re.fullmatch(rf"data\.{part}: none of the 3 records looked at can be used \(.*{why}", problem)


@pytest.mark.parametrize("record", [{"text": 3}, {"text": "word " * 400}])
def test_data_of_which_nothing_can_be_used_is_told_as_training_tells_it(
    check: Callable[..., Result], command: Command, tmp_path: Path, record: dict[str, Any]
) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [record] * 3)
    data = {"train": [{"path": path, "format": "text"}], "on_error": "skip", "too_long": "drop"}
    (problem,) = as_json(check("--json", data=data), code=2)["problems"]
    refused = command("train", tmp_path / "run.yaml")
    assert refused.err.rstrip().endswith(f"error: {problem.replace(' looked at', '')}")


def test_why_a_record_was_left_out_is_no_figure_of_a_source(check: Callable[..., Result], tmp_path: Path) -> None:
    """It stands among the problems, where there is one."""
    path = write_jsonl(tmp_path / "data.jsonl", [{"text": 3}, {"text": "word " * 40}])
    found = as_json(check("--json", data={"train": [{"path": path, "format": "text"}], "on_error": "skip"}))
    (source,) = found["data"]["train"]
    assert (source["looked_at"], source["unusable"]) == (2, 1)
    assert "must be text" not in json.dumps(found["data"])


def test_a_source_of_which_nothing_can_be_used_is_none_beside_another(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path
) -> None:
    """As in training."""
    paths = [write_jsonl(tmp_path / "data.jsonl", [{"text": 3}]), tiny["train"]]
    data = {"train": [{"path": path, "format": "text"} for path in paths], "on_error": "skip"}
    assert as_json(check("--json", data=data))["problems"] == []


def test_records_that_cannot_be_used_fill_no_steps(
    check: Callable[..., Result], run_file: RunFile, tmp_path: Path
) -> None:
    lines = [{"text": text[:100]} for text in texts()[:12]]
    data = {
        "train": [{"path": write_jsonl(tmp_path / "data.jsonl", [*lines, *[{"text": 3}] * 24]), "format": "text"}],
        "on_error": "skip",
    }
    training = {"epochs": 2, "steps": None, "tokens_per_step": 200}
    batches = as_json(check("--json", data=data, training=training))["batches"]
    assert batches["steps"] == pytest.approx(kdflow.train(run_file(data=data, training=training)).steps, abs=2)
    assert batches["epochs"] == pytest.approx(2)


@pytest.mark.parametrize(("tokens_per_step", "batches"), [(200, 1), (201, 2), (1000, 5), (1001, 6)])
def test_what_is_over_a_micro_batch_takes_another_one(
    check: Callable[..., Result], tokens_per_step: int, batches: int
) -> None:
    training = {"tokens_per_step": tokens_per_step}
    found = as_json(check("--json", data={"max_tokens": 200, "max_length": 100}, training=training))["batches"]
    assert found["micro_batches_per_step_and_device"] == batches


def test_a_teacher_that_follows_is_as_large_as_the_student(check: Callable[..., Result], tiny: dict[str, str]) -> None:
    student = {"model": tiny["teacher"], "keep_layers": "::2"}
    models = as_json(check("--json", student=student, teacher={"follow": {"every": 5}}))["models"]
    assert models["teacher"]["layers"] == models["student"]["layers"] == 2


def test_too_much_for_the_device_is_a_problem(check: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdflow.runtime.memory.capacity", lambda: 1000)
    result = check("--json")
    (problem,) = as_json(result, code=2)["problems"]
    assert "are needed on each device" in problem


@pytest.mark.usefixtures("no_sglang")
def test_what_train_would_refuse_is_a_problem(check: Callable[..., Result], tiny: dict[str, str]) -> None:
    found = as_json(check("--json", "training.replicas=3"), code=2)
    assert found["problems"] == ["training.replicas: 3 groups cannot divide 1 ranks evenly; give a divisor of 1"]
    found = as_json(check("--json", teacher={"model": tiny["teacher"], "engine": {"name": "sglang"}}), code=2)
    (problem,) = found["problems"]
    assert problem.endswith("needs the package sglang, which is not installed: pip install 'kdflow[sglang]'")
    streamed = {"train": [{"path": tiny["train"], "format": "text", "streaming": True}]}
    refused = check(data=streamed, training={"epochs": 1, "steps": None})
    assert (refused.code, "the size of streamed data is not known" in refused.err) == (2, True)
    assert found["memory"]["bytes"]["teacher"] > 0, "the rest is told all the same"


def test_engines_that_could_sleep_are_named_where_a_device_is_too_small(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [{"prompt": text[:40], "response": text[40:200]} for text in texts()[:20]]
    source = {"path": write_jsonl(tmp_path / "prompts.jsonl", prompts), "format": "prompt_response"}
    data = {"train": [source], "eval": [], "max_length": 128, "max_tokens": 128}

    def advice(teacher: dict[str, Any], rollout: dict[str, Any] | None) -> str:
        sections = {"teacher": {"model": tiny["teacher"], **teacher}, "rollout": rollout, "data": data}
        *_, problem = as_json(check("--json", **sections), code=2)["problems"]
        found = re.search(r"are needed on each device, which has 0\.0 GiB: (.*)lower data\.max_tokens", problem)
        assert found is not None
        return found[1]

    monkeypatch.setattr("kdflow.runtime.memory.capacity", lambda: 1000)
    asleep = ", with which it is 0.0 GiB, "
    writes = {"max_new_tokens": 8}
    assert advice({}, None) == f"set teacher.sleep{asleep}"
    assert advice({}, writes) == f"set teacher.sleep and rollout.sleep{asleep}"
    assert advice({"sleep": True}, writes) == f"set rollout.sleep{asleep}"
    assert advice({"sleep": True}, {**writes, "fraction": 0}) == ""
    assert advice({"engine": {"name": "sglang", "placement": "dedicated"}}, None) == ""


def test_engines_that_sleep_make_room(check: Callable[..., Result], tiny: dict[str, str]) -> None:
    plans = [
        as_json(check("--json", teacher={"model": tiny["untied"], "sleep": sleep}))["memory"]["bytes"]
        for sleep in (False, True)
    ]
    assert plans[1]["teacher"] == (2 * 400 * 32 + 32) * 4 < plans[0]["teacher"], "head and embeddings stay"
    assert plans[1]["teacher_rows"] > plans[0]["teacher_rows"], "those of all micro-batches are kept"
    assert plans[1]["total"] < plans[0]["total"]


def test_a_run_file_at_fault_is_an_error_as_ever(check: Callable[..., Result]) -> None:
    result = check("training.stepz=3")
    assert (result.code, result.out) == (2, "")
    assert "did you mean 'steps'?" in result.err


def test_between_tokenizers_it_tells_what_they_share_and_how_the_data_is_aligned(
    check: Callable[..., Result], tiny: dict[str, str]
) -> None:
    sections = {"teacher": {"model": tiny["foreign"]}, "algorithm": {"name": "uld"}}
    found = as_json(check("--json", **sections))
    (source,) = found["data"]["train"]
    assert set(source["aligned"]) == {"one_to_one", "spanning", "unmatched"}
    assert sum(source["aligned"].values()) == pytest.approx(1)
    assert 0 < source["aligned"]["one_to_one"] < 1
    page = check(**sections)
    assert f"{source['aligned']['one_to_one']:.1%} of the learnt tokens are aligned one-to-one" in page.out
    shared = found["tokenizers"]["vocabulary"]["shared_tokens"]
    assert shared > 0
    assert f"The vocabularies share {shared:,} tokens" in page.out


def test_operations_follow_what_the_teacher_reads(check: Callable[..., Result], tmp_path: Path) -> None:
    pieces = [text[:120] for text in texts()][:24]
    found = {}
    for name in ("same", "more"):
        records = [{"prompt": piece[40:80], "response": piece[80:]} for piece in pieces]
        if name == "more":
            records = [{**one, "teacher_prompt": piece[:80]} for one, piece in zip(records, pieces, strict=True)]
        source = {"path": write_jsonl(tmp_path / f"{name}.jsonl", records), "format": "prompt_response"}
        data = {"train": [source], "max_length": 256, "max_tokens": 256}
        found[name] = as_json(check("--json", data=data))["flops_per_step"]
    assert found["more"] > 1.1 * found["same"]


def test_an_algorithm_of_one_vocabulary_is_refused_between_two(
    check: Callable[..., Result], tiny: dict[str, str]
) -> None:
    result = check(teacher={"model": tiny["foreign"]}, algorithm={"name": "dskd", "alignment": "same"})
    assert result.code == 2
    assert "algorithm 'dskd' needs student and teacher to share a vocabulary" in result.out


def test_a_teacher_whose_sizes_cannot_be_read_is_no_problem(
    check: Callable[..., Result], command: Command, tiny: dict[str, str], tmp_path: Path
) -> None:
    """OPT's decoder, whose blocks lie deeper, cannot be sharded, but it teaches."""
    size = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    tokenizer = AutoTokenizer.from_pretrained(tiny["student"])
    OPTForCausalLM(OPTConfig(vocab_size=384, max_position_embeddings=256, **size)).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    for dtype in ("float32", "bfloat16"):  # bfloat16 is planned with the kernel
        result = check("--json", teacher={"model": str(tmp_path / "opt")}, training={"steps": 1, "dtype": dtype})
        found = as_json(result)
        assert found["problems"] == []
        assert set(found["models"]) == {"student"}
        assert found["memory"]["bytes"]["teacher"] is None
        assert found["flops_per_step"] is None
    page = command("check", tmp_path / "run.yaml").out
    assert re.search(r"teacher +│? *not known", page)
    assert command("train", tmp_path / "run.yaml").code == 0


@pytest.mark.parametrize(("side", "told"), [
    ("student", ["MambaForCausalLM: its config has no num_attention_heads; kdflow knows models that are made of "
                 "attention"]),
    ("teacher", []),
])  # fmt: skip
def test_a_model_without_attention_is_no_traceback(
    check: Callable[..., Result], tiny: dict[str, str], tmp_path: Path, side: str, told: list[str]
) -> None:
    make_config("mamba", vocab_size=384).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(tiny["student"]).save_pretrained(tmp_path / "mamba")
    found = as_json(check("--json", **{side: {"model": str(tmp_path / "mamba")}}), code=2 if told else 0)
    assert found["problems"] == told


PREPARES = """
import kdflow
from kdflow.contracts import LossSum

class Prepares(kdflow.Algorithm):
    name = "prepares"
    def prepare(self, pair):
        {prepare}
    def loss(self, student, teacher, batch):
        return LossSum(student.rows.sum())

@kdflow.hookimpl
def kdflow_algorithms():
    return [Prepares]
"""


@pytest.mark.parametrize(("prepare", "told"), [
    ("return None", "algorithm 'prepares': prepare must return a kdflow.contracts.Pair, but returned None"),
    ("return pair.nothing", "algorithm 'prepares': prepare failed at {train}:1: AttributeError: 'Pair' object has no "
                            "attribute 'nothing'"),
    ("return pair.with_teacher_targets(pair.teacher.targets > 9)",
     "{train}:1: targets of the teacher are dropped by how the sides are aligned, and this pair is not: let the "
     "algorithm's needs name 'teacher' and 'aligner', or leave out rows in its loss"),
])  # fmt: skip
def test_an_algorithm_that_fails_at_the_data_is_a_problem(
    check: Callable[..., Result], site: Path, tiny: dict[str, str], prepare: str, told: str
) -> None:
    plugin("kdflow_prepares", PREPARES.replace("{prepare}", prepare)).install(site)
    found = as_json(check("--json", algorithm={"name": "prepares"}), code=2)
    assert found["problems"] == [told.replace("{train}", tiny["train"])]
    assert found["memory"]["bytes"]["total"] > 0


def test_checkpoints_on_disk_are_those_that_lie_there_at_once(
    command: Command, run_file: RunFile, tmp_path: Path
) -> None:
    def needed(teacher: dict[str, Any] | None = None, **training: Any) -> int:
        run = run_file(training=training)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "teacher": teacher or run["teacher"]}))
        found = as_json(command("check", tmp_path / "run.yaml", "--json"))
        return int(found["memory"]["checkpoints_on_disk"])

    one = needed()  # at the end alone
    many = {"steps": 100, "checkpoint_every": 1}
    assert needed(**many, keep_checkpoints=1) == 2 * one
    assert needed(**many) == 4 * one
    assert needed(steps=3, checkpoint_every=2) == 2 * one, "two are ever written"
    parameters = {"parameters": "bfloat16"}
    following = [needed({"follow": follow}, **parameters) for follow in ({"every": 1}, {"ema": 0.9})]
    assert following == [one // 2 + one // 6, one // 2 + one // 3], "the average is kept in fp32"
    planned = needed({"follow": {"ema": 0.9}})
    kdflow.train({**run_file(training={"steps": 1}), "teacher": {"follow": {"ema": 0.9}}})
    tensors = saved(tmp_path / "run" / "checkpoints" / "latest")
    written = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("rng"))
    assert written == pytest.approx(planned, rel=0.01)


def test_a_disk_without_room_for_the_checkpoints_is_a_problem(
    check: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the disk of the output, not that of the current folder."""
    usage = shutil.disk_usage

    def small(path: Path) -> Any:
        return usage(path)._replace(free=1000) if path == tmp_path else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", small)
    output = tmp_path / "not" / "yet"
    found = as_json(check("--json", output=str(output)), code=2)
    assert found["environment"]["hardware"]["free_disk_bytes"] == 1000
    assert found["problems"] == [
        f"output: the checkpoints take about 0.0 GiB, and 0.0 GiB are free where {output} is: make room there, lower "
        "training.keep_checkpoints, or give another output"
    ]
