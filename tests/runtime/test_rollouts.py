"""On-policy runs: what the student writes is of its weights as they are, and is what it is trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import kdflow
from kdflow.contracts import STEP_FIGURES, KdflowError, Rollout, Sampling, TrainingStopped
from kdflow.engines.transformers.rollout import TransformersRollout
from kdflow.runtime.prepare import engines, prepare
from kdflow.runtime.student import Student
from tests.support.commands import site
from tests.support.distributions import plugin
from tests.support.models import TEMPLATE, make_foreign_tokenizer, make_model, make_tokenizer, texts, write_jsonl
from tests.support.runs import events, interrupted, trajectory

__all__ = ["site"]

RunFile = Callable[..., dict[str, Any]]


@pytest.fixture
def on_policy(run_file: RunFile, tmp_path: Path) -> RunFile:
    """Makes runs over prompts, whose answers the student writes itself, 8 tokens at a time."""
    pieces = [text[start : start + 80] for text in texts() for start in range(0, 480, 80)]
    records = [{"prompt": piece[:40], "response": piece[40:]} for piece in pieces]
    train = write_jsonl(tmp_path / "prompts.jsonl", records[:40])

    def make(**sections: Any) -> dict[str, Any]:
        data = {**run_file()["data"], "train": [{"path": train, "format": "prompt_response"}]}
        rollout = {"max_new_tokens": 8, "fraction": 1.0, **sections.pop("rollout", {})}
        return run_file(**{"data": data, "rollout": rollout, **sections})

    return make


def run(made: dict[str, Any]) -> Path:
    kdflow.train(made)
    return Path(made["output"])


def written(output: Path, step: int) -> list[dict[str, Any]]:
    with (output / "rollouts" / f"step-{step:08d}.jsonl").open(encoding="utf-8") as lines:  # texts may hold U+2028
        return [json.loads(line) for line in lines]


def greedy_twice(on_policy: RunFile, tiny: dict[str, str], tmp_path: Path, rate: float, **engine: Any) -> Path:
    """A run in which the student answers each of eight prompts twice, at this learning rate, greedily."""
    prompts = [{"prompt": text[:30], "response": "so it was."} for text in texts()[:8]]
    source = {"path": write_jsonl(tmp_path / "few.jsonl", prompts), "format": "prompt_response"}
    training = {"steps": 2, "tokens_per_step": 10000, "learning_rate": rate, "schedule": "constant", "warmup": 0}
    data = {"train": [source], "eval": [], "max_length": 128, "max_tokens": 256}
    made = on_policy(
        training={**training, "epochs": 2},
        data=data,
        rollout={"temperature": 0, "save": True, "max_new_tokens": 32, **engine},
        student={"model": tiny["untied"]},
    )
    made["training"]["tokens_per_step"] = 100  # several steps an epoch
    return run({**made, "training": {**made["training"], "steps": 40}})


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (1e-3, False)])
def test_greedy_responses_change_with_the_weights_and_only_with_them(
    on_policy: RunFile, tiny: dict[str, str], tmp_path: Path, rate: float, same: bool
) -> None:
    output = greedy_twice(on_policy, tiny, tmp_path, rate)
    assert_same_twice(output, same)
    gaps = [event["rollout_gap"] for event in events(output, "step")]
    assert max(gaps) < 1e-5, "what was drawn is what is trained on, with the same weights"


def assert_same_twice(output: Path, same: bool) -> None:
    """Whether both answers to each prompt are the same."""
    found: dict[str, list[str]] = {}
    for step in range(1, len(events(output, "step")) + 1):
        for line in written(output, step):
            found.setdefault(line["sample"], []).append(line["response"])
    assert len(found) == 8
    assert all(len(responses) == 2 for responses in found.values())
    assert all(one == other for one, other in found.values()) == same


@pytest.mark.parametrize("student", [{"lora": {"rank": 4}}, {"keep_layers": "::2"}, {"keep_layers": [0], "lora": {}}])
def test_the_engine_holds_the_student_as_it_is(
    on_policy: RunFile, tiny: dict[str, str], student: dict[str, Any]
) -> None:
    training = {"learning_rate": 3e-2, "schedule": "constant", "warmup": 0}
    made = on_policy(student={"model": tiny["untied"], **student}, training=training)
    output = run(made)
    assert max(event["rollout_gap"] for event in events(output, "step")) < 1e-4
    assert not (output / ".student").exists()
    stale = run({**made, "rollout": {**made["rollout"], "sync_every": 9}, "output": f"{output}-stale"})
    gaps = [event["rollout_gap"] for event in events(stale, "step")]
    assert gaps[0] < 1e-4 < 1e-2 < gaps[-1], "older weights show"
    phases = [event["phases"] for event in events(stale, "step")]
    assert phases[0]["sync"] > 10 * max(phase["sync"] for phase in phases[1:])
    assert all(phase["rollout"] > 0 for phase in phases)


def test_without_a_fraction_nothing_is_written_and_nothing_else_changes(on_policy: RunFile) -> None:
    made = on_policy(rollout={"fraction": 0.0})
    output = run(made)
    plain = run({**made, "rollout": None, "output": f"{output}-plain"})
    assert trajectory(output) == trajectory(plain)
    assert "rollouts" not in events(output, "step")[0]


def test_a_share_is_written_n_times_and_the_rest_is_the_datas(on_policy: RunFile) -> None:
    output = run(on_policy(rollout={"fraction": 0.5, "n": 3, "save": True}, training={"steps": 6}))
    steps = events(output, "step")
    assert len({event["rollouts"] for event in steps}) > 1
    for event in steps:
        lines = written(output, event["step"])
        assert len(lines) == event["rollouts"]
        assert all(times % 3 == 0 for times in Counter(line["sample"] for line in lines).values())
        assert sum(line["tokens"] for line in lines) == event["rollout_tokens"]
        assert event["rollout_stopped"] == sum(line["finish"] == "stop" for line in lines) / len(lines)
        assert len({(line["sample"], line["response"]) for line in lines}) > len(lines) / 2, "drawn each on its own"
    plain = run({**on_policy(rollout={"fraction": 0.0}, training={"steps": 6}), "output": f"{output}-plain"})
    assert [event["epoch"] for event in steps] == [event["epoch"] for event in events(plain, "step")]
    assert sum(event["rollout_tokens"] for event in steps) < sum(event["target_tokens"] for event in steps)


def test_responses_are_no_longer_than_what_can_be_learnt(on_policy: RunFile) -> None:
    made = on_policy(rollout={"max_new_tokens": 400, "save": True}, training={"steps": 3, "tokens_per_step": 300})
    made["data"] |= {"max_length": 64, "max_tokens": 128}
    output = run(made)
    for event in events(output, "step"):
        lines = written(output, event["step"])
        assert event["target_tokens"] == event["rollout_tokens"] == sum(line["tokens"] for line in lines)
        assert event["rollout_cut"] == sum(line["finish"] == "length" for line in lines) / len(lines) > 0
    whole = run({**on_policy(), "output": f"{output}-whole"})
    assert [event["rollout_cut"] for event in events(whole, "step")] == [0.0] * len(events(whole, "step"))


def test_responses_that_cannot_be_kept_end_the_run_with_a_checkpoint(
    on_policy: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = on_policy(rollout={"save": True})
    output, step = Path(made["output"]), Student.step

    def steps(self: Student, share: float) -> None:
        step(self, share)
        (output / "rollouts").rename(output / "before")
        (output / "rollouts").touch()

    monkeypatch.setattr(Student, "step", steps)
    with pytest.raises(
        KdflowError, match=r"rollouts cannot be written to: .*; mend it\n.*Step 1 is kept as a checkpoint"
    ):
        kdflow.train(made)
    assert (output / "checkpoints" / "step-00000001").is_dir()


def test_a_resume_forgets_the_responses_that_come_after_its_checkpoint(on_policy: RunFile, tmp_path: Path) -> None:
    training = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9}
    made = on_policy(rollout={"save": True}, training=training)
    stopped = interrupted(run(made), tmp_path / "stopped", 2)
    (stopped / "rollouts" / "step-of-mine.jsonl").touch()
    kdflow.train({**made, "training": {**made["training"], "steps": 3}, "output": str(stopped)}, resume="auto")
    names = sorted(file.name for file in (stopped / "rollouts").iterdir())
    assert names == [*(f"step-{step:08d}.jsonl" for step in (1, 2, 3)), "step-of-mine.jsonl"]


def test_a_step_in_which_nothing_is_written_needs_no_weights_and_tells_no_gap(
    on_policy: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes, synced = TransformersRollout.update_weights, 0

    def counted(self: TransformersRollout, weights: Iterator[tuple[str, Tensor]]) -> None:
        nonlocal synced
        synced += 1
        takes(self, weights)

    monkeypatch.setattr(TransformersRollout, "update_weights", counted)
    training = {"steps": 12, "learning_rate": 3e-2, "schedule": "constant", "warmup": 0}
    steps = events(run(on_policy(rollout={"fraction": 0.1}, training=training)), "step")
    written = [step for step in steps if step["rollouts"]]
    assert 0 < len(written) < len(steps)
    assert synced == len(written)
    assert all(("rollout_gap" in step) == bool(step["rollouts"]) for step in steps)
    assert max(step["rollout_gap"] for step in written) < 1e-5, "weights are those of the step"


def test_a_response_ends_where_a_text_occurs(on_policy: RunFile) -> None:
    greedy = {"temperature": 0, "save": True, "max_new_tokens": 32}
    made = on_policy(rollout=greedy, training={"steps": 1})
    plain = [line["response"] for line in written(run(made), 1)]
    text = Counter("".join(response[3:12] for response in plain)).most_common(1)[0][0]
    made = on_policy(rollout={**greedy, "stop": [text]}, training={"steps": 1}, output=f"{made['output']}-stop")
    stopped = written(run(made), 1)
    assert any(text in response for response in plain)
    for line, response in zip(stopped, plain, strict=True):
        before, found, _ = response.partition(text)
        if found:
            assert line["finish"] == "stop"
            assert line["response"].startswith(before + found)
            assert text not in line["response"][:-1].removesuffix(text)
        else:
            assert line["response"] == response


@pytest.mark.parametrize("name", ["reverse_kl", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd", "sft"])
def test_every_divergence_learns_from_what_the_student_writes(on_policy: RunFile, name: str) -> None:
    steps = events(run(on_policy(algorithm={"name": name}, rollout={"fraction": 0.5}, training={"steps": 2})), "step")
    assert sum(step["rollouts"] for step in steps) > 0
    assert max(step.get("rollout_gap", 0.0) for step in steps) < 1e-4


def test_an_engine_that_does_not_take_the_weights_is_refused(
    on_policy: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 6, "learning_rate": 3e-2, "schedule": "constant", "warmup": 0, "checkpoint_every": 1}
    made = on_policy(training=training)
    takes, synced = TransformersRollout.update_weights, 0

    def forgets_one(self: TransformersRollout, weights: Iterator[tuple[str, Tensor]]) -> None:
        nonlocal synced
        synced += 1
        takes(self, ((name, one) for name, one in weights if synced < 3 or "down_proj" not in name))

    monkeypatch.setattr(TransformersRollout, "update_weights", forgets_one)
    with pytest.raises(TrainingStopped, match=r"step 3: .* by rollout.engine 'transformers' .* differ .* at most 0.01"):
        run(made)
    assert [event["step"] for event in events(made["output"], "step")] == [1, 2]
    dropping = {**made, "student": {**made["student"], "lora": {"rank": 2, "dropout": 0.5}}}
    monkeypatch.setattr(TransformersRollout, "update_weights", takes)
    output = run({**dropping, "output": f"{made['output']}-dropping"})
    assert max(event["rollout_gap"] for event in events(output, "step")) > 1e-2, "dropout is no fault of the engine"


def test_a_teacher_of_another_tokenizer_reads_what_the_student_writes(on_policy: RunFile, tiny: dict[str, str]) -> None:
    teacher = {"model": tiny["foreign"]}
    for algorithm in ("uld", "min_edit", "overlap", "dskd"):
        made = on_policy(teacher=teacher, algorithm={"name": algorithm}, rollout={"fraction": 0.7})
        steps = events(run({**made, "output": f"{made['output']}-{algorithm}"}), "step")
        assert all(event["rollout_gap"] < 1e-5 for event in steps)
        assert all(event["aligned_one_to_one"] + event["aligned_spanning"] > 0.2 for event in steps)
        assert steps[-1]["loss"] != steps[0]["loss"]


SHARE = """
import kdflow
from kdflow.data.formats import Chat

class Share(Chat):
    name = "sharegpt"

@kdflow.hookimpl
def kdflow_datasets():
    return [Share]
"""


@pytest.fixture
def two_ends(on_policy: RunFile, tmp_path: Path, site: Path) -> RunFile:
    """Makes on-policy runs of models whose texts end otherwise than their turns, over sources of these formats."""
    plugin("kdflow_share", SHARE).install(site)
    ours, theirs = make_tokenizer(), make_foreign_tokenizer(template=TEMPLATE)
    ours.eos_token = "<|endoftext|>"
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    student = make_model(tmp_path / "student", tokenizer=ours, tied=False, scale=0.5)
    teacher = make_model(tmp_path / "teacher", tokenizer=theirs, tied=False, seed=1)
    pieces = [text[start : start + 80] for text in texts() for start in range(0, 240, 80)]
    plain = [{"prompt": piece[:40], "response": piece[40:]} for piece in pieces]
    turns = [[{"role": "user", "content": piece[:40]}, {"role": "assistant", "content": piece[40:]}]
             for piece in pieces]  # fmt: skip
    paths = {
        "prompt_response": write_jsonl(tmp_path / "plain.jsonl", plain),
        "chat": write_jsonl(tmp_path / "turns.jsonl", [{"messages": one} for one in turns]),
    }

    def make(*formats: str, **source: Any) -> dict[str, Any]:
        data = {**on_policy()["data"], "max_tokens": 1024}
        data["train"] = [{"path": paths.get(name, paths["chat"]), "format": name, **source} for name in formats]
        training = {"steps": 3, "tokens_per_step": 1500}
        return on_policy(
            data=data, student={"model": student}, teacher={"model": teacher}, algorithm={"name": "overlap"},
            training=training, rollout={"max_new_tokens": 200, "fraction": 0.7, "save": True},
            output=str(tmp_path / "-".join(formats)),
        )  # fmt: skip

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_of_a_plugins_format_end_as_those_of_chat_do(two_ends: RunFile, streaming: bool) -> None:
    chat, share = (run(two_ends(name, streaming=streaming)) for name in ("chat", "sharegpt"))
    assert [written(share, step) for step in (1, 2, 3)] == [written(chat, step) for step in (1, 2, 3)]
    assert trajectory(share) == trajectory(chat), "the ends that the vocabularies share among the rest"
    assert sum(step["rollout_stopped"] for step in events(share, "step")) > 0


def test_in_a_mixture_each_response_ends_as_its_sample_does(two_ends: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    generates, asked = TransformersRollout.generate, list[tuple[bool, tuple[int, ...]]]()

    def told(self: TransformersRollout, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        asked.extend((1 in prompt, sampling.stop_ids) for prompt in prompts)  # a turn begins with <|im_start|>
        return generates(self, prompts, sampling)

    monkeypatch.setattr(TransformersRollout, "generate", told)
    output = run(two_ends("chat", "prompt_response"))
    assert set(asked) == {(True, (0, 2)), (False, (0,))}
    lines = [line for step in (1, 2, 3) for line in written(output, step)]
    assert len(lines) == len(asked) == sum(step["rollouts"] for step in events(output, "step"))
    for line in lines:
        assert ("turns.jsonl" in line["sample"]) == line["prompt"].startswith("user")


def test_every_figure_of_a_step_has_a_name_that_no_metric_may_have(on_policy: RunFile, tiny: dict[str, str]) -> None:
    made = on_policy(teacher={"model": tiny["foreign"]}, algorithm={"name": "uld"}, training={"steps": 1})
    (step,) = events(run(made), "step")
    assert step.keys() - STEP_FIGURES == {"kd"}
    # Of a known GPU, and of an engine that is compared with the model; a metric may have any other name.
    assert STEP_FIGURES - step.keys() == {"flops_utilisation", "teacher_parity"}


def test_gkd_writes_half_of_the_responses_by_itself(on_policy: RunFile) -> None:
    made = on_policy(algorithm={"name": "gkd"})
    own = run({**made, "rollout": {"max_new_tokens": 8}})
    assert "on_policy: 0.5" in (own / "run.yaml").read_text()
    jsd = {
        **made,
        "algorithm": {"name": "jsd"},
        "rollout": {**made["rollout"], "fraction": 0.5},
        "output": f"{own}-jsd",
    }
    assert trajectory(run(jsd)) == trajectory(own)
    skewed = {"name": "gkd", "divergence": {"name": "skew_kl", "skew": 0.3}, "on_policy": 0}
    off = run({**made, "rollout": None, "algorithm": skewed, "output": f"{own}-skew"})
    plain = {**made, "rollout": None, "algorithm": {"name": "skew_kl", "skew": 0.3}, "output": f"{own}-plain"}
    assert trajectory(run(plain)) == trajectory(off)


OWN_ANSWERS = """
import kdflow
from kdflow.contracts import LossSum

class OwnAnswers(kdflow.Algorithm):
    name = "own_answers"
    needs = frozenset({"rollouts"})
    class Options(kdflow.Options):
        from_data: bool = False
    def __init__(self, options=None):
        super().__init__(options)
        if self.options.from_data:
            self.needs = frozenset()
    def loss(self, student, teacher, batch):
        return LossSum(student.rows.sum())

@kdflow.hookimpl
def kdflow_algorithms():
    return [OwnAnswers]
"""


@pytest.mark.parametrize(("options", "rollout", "share"), [
    ({}, None, 1.0), ({"from_data": True}, None, 0.0), ({}, {"fraction": 0.25}, 0.25),
])  # fmt: skip
def test_what_an_algorithm_needs_the_student_to_write_is_written(
    on_policy: RunFile, site: Path, options: dict[str, Any], rollout: dict[str, Any] | None, share: float
) -> None:
    plugin("kdflow_own_answers", OWN_ANSWERS).install(site)
    made = on_policy(algorithm={"name": "own_answers", **options})
    config, plugins = prepare({**made, "rollout": rollout}, (), ())
    assert config.rollout_fraction == share
    assert engines(config, plugins).keys() == {"teacher", *(["rollout"] if share else [])}
    assert prepare(config.as_dict(), (), ())[0] == config


@pytest.mark.parametrize(("changes", "message"), [
    ({"algorithm": {"name": "gkd", "on_policy": 0.2}, "rollout": {"fraction": 0.4}},
     "run: rollout.fraction: is 0.4 and algorithm.on_policy is 0.2, which mean the same share; keep one"),
    ({"algorithm": {"name": "gkd", "divergence": "tvd", "beta": 0.2}}, "beta is an option of jsd"),
    ({"algorithm": {"name": "gkd", "divergence": {"name": "jsd", "beta": 0.1}, "beta": 0.9}},
     "beta stands beside divergence and in its section, too; keep one"),
    ({"rollout": {"engine": {"name": "transformer"}}}, "rollout.engine.name: rollout engine 'transformer' is not"),
    ({"rollout": {"fraction": 1.5}}, "rollout.fraction: input should be less than or equal to 1, not 1.5"),
    ({"rollout": {"tokens": 4}}, "rollout.tokens: unknown key"),
    ({"rollout": {"temperature": 0, "n": 4}},
     "at temperature 0 the 4 responses to a prompt are the same: take n=1, or sample"),
])  # fmt: skip
def test_faults_of_the_section_are_named(on_policy: RunFile, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KdflowError) as caught:
        kdflow.train({**on_policy(), **changes})
    assert message in str(caught.value)


def test_a_sample_without_a_prompt_is_refused(run_file: RunFile, tiny: dict[str, str]) -> None:
    with pytest.raises(KdflowError, match=r"train.jsonl:1: there is no prompt that the student could answer itself"):
        kdflow.train(run_file(rollout={"max_new_tokens": 8}))
    kdflow.train(run_file(rollout={"fraction": 0.0}))
