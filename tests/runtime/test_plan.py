"""Which engines sleep, where a run file leaves it to the memory plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdflow.config import RunConfig
from kdflow.plugins import Plugins
from kdflow.runtime import memory
from kdflow.runtime.plan import EngineBytes, MemoryPlan, asleep_on_a_gpu, with_sleep_decided
from kdflow.runtime.prepare import make_algorithm, prepare
from kdflow.runtime.processes import Processes
from kdflow.runtime.tokenizers import open_tokenizers

RunFile = Callable[..., dict[str, Any]]
WRITES = {"fraction": 1.0, "max_new_tokens": 8, "engine": {"name": "transformers"}}
MUCH = 2**40


@pytest.fixture
def prepared(run_file: RunFile, tiny: dict[str, str]) -> Callable[..., tuple[RunConfig, Plugins]]:
    def make(**sections: Any) -> tuple[RunConfig, Plugins]:
        teacher = {"model": tiny["teacher"], **sections.pop("teacher", {})}
        rollout = {**WRITES, **sections.pop("rollout", {})}
        return prepare(run_file(teacher=teacher, rollout=rollout, **sections), [], ())

    return make


def totals(config: RunConfig, plugins: Plugins) -> dict[frozenset[str], int]:
    """What each set of sleeping engines needs, by their sections."""
    student = memory.student_shape(config)
    teacher = memory.teacher_shape(config)
    plan = MemoryPlan(config, plugins, make_algorithm(config, plugins), student, teacher, 1, MUCH,
                      config.data.max_tokens, 2)  # fmt: skip
    sets: list[list[EngineBytes]] = [[], plan.engines[1:], plan.engines[:1], plan.engines]
    return {frozenset(one.section for one in asleep): plan.total(asleep) for asleep in sets}


def test_as_few_sleep_as_let_the_rest_fit(prepared: Callable[..., tuple[RunConfig, Plugins]]) -> None:
    config, plugins = prepared()
    for asleep, needed in totals(config, plugins).items():
        found = asleep_on_a_gpu(config, plugins, 1, int(needed / 0.95) + 1)
        sleeping = {section for section, sleeps in found.items() if sleeps}
        assert set(found) == {"teacher", "rollout"}
        assert len(sleeping) <= len(asleep), "no more than this set, which fits"
    assert asleep_on_a_gpu(config, plugins, 1, MUCH) == {"teacher": False, "rollout": False}
    everything = totals(config, plugins)[frozenset()]
    assert asleep_on_a_gpu(config, plugins, 1, int(everything / 0.95) - 1) == {"teacher": False, "rollout": True}
    assert asleep_on_a_gpu(config, plugins, 1, 1000) == {"teacher": True, "rollout": True}, "nothing fits"


def test_what_the_run_file_says_stands(prepared: Callable[..., tuple[RunConfig, Plugins]]) -> None:
    config, plugins = prepared(teacher={"sleep": False})
    assert asleep_on_a_gpu(config, plugins, 1, 1000) == {"rollout": True}
    config, plugins = prepared(teacher={"sleep": False}, rollout={"sleep": True})
    assert asleep_on_a_gpu(config, plugins, 1, 1000) == {}


def test_engines_that_give_nothing_back_stay_awake(prepared: Callable[..., tuple[RunConfig, Plugins]]) -> None:
    dedicated = {"name": "sglang", "placement": "dedicated"}
    config, plugins = prepared(teacher={"engine": dedicated}, rollout={"fraction": 0})
    assert asleep_on_a_gpu(config, plugins, 1, 1000) == {"teacher": False}


def test_a_teacher_that_follows_is_as_large_as_the_student_that_is_cut(
    prepared: Callable[..., tuple[RunConfig, Plugins]], tiny: dict[str, str]
) -> None:
    student = {"model": tiny["teacher"], "keep_layers": "::2"}
    config, plugins = prepared(student=student, teacher={"follow": {"every": 5}}, rollout={"fraction": 0})
    needed = totals(config, plugins)[frozenset()]
    assert asleep_on_a_gpu(config, plugins, 1, int(needed / 0.95) + 1) == {"teacher": False}


def test_a_teacher_that_only_its_engine_knows_stays_awake(
    prepared: Callable[..., tuple[RunConfig, Plugins]], tiny: dict[str, str], tmp_path: Path
) -> None:
    foreign = shutil.copytree(tiny["teacher"], tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "martian"}')
    config, plugins = prepared(teacher={"model": str(foreign), "engine": {"name": "sglang"}}, rollout={"fraction": 0})
    assert asleep_on_a_gpu(config, plugins, 1, 1000) == {"teacher": False}
    tokenize, _ = open_tokenizers(config, plugins, make_algorithm(config, plugins))
    assert tokenize.max_length == config.data.max_length


def test_a_run_is_told_once_and_says_it_of_every_engine(
    prepared: Callable[..., tuple[RunConfig, Plugins]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, plugins = prepared(teacher={"sleep": False})
    with Processes() as processes:
        monkeypatch.setattr(memory, "capacity", lambda: 1000)
        small = with_sleep_decided(config, plugins, processes)
        monkeypatch.setattr(memory, "capacity", lambda: MUCH)
        large = with_sleep_decided(config, plugins, processes)
    assert small.teacher is not None
    assert small.rollout is not None
    assert large.rollout is not None
    assert (small.teacher.sleep, small.rollout.sleep, large.rollout.sleep) == (False, True, False)
    assert caplog.text.count("rollout.sleep: the GPU has no room for all models at once") == 1
    assert config.rollout is not None
    assert config.rollout.sleep is None
