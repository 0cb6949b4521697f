"""Engines that sleep while the student learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdflow
from kdflow.contracts import KdflowError
from kdflow.runtime.student import Student
from tests.runtime.test_rollouts import on_policy as on_policy
from tests.support.runs import events, trajectory
from tests.support.turns import Turns

RunFile = Callable[..., dict[str, Any]]
STEPS = 4
TEACHER, ROLLOUT = "TransformersTeacher", "TransformersRollout"


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    return Turns(monkeypatch)


def figures(output: Path) -> list[tuple[Any, ...]]:
    evaluated = [tuple(event[key] for key in ("divergence", "cross_entropy")) for event in events(output, "eval")]
    return [*trajectory(output), *evaluated]


@pytest.mark.parametrize(
    ("sections", "asleep", "begun"),
    [
        # Three evaluations: before training, after step 2 and at the end.
        ({"teacher": {"sleep": True}}, {TEACHER}, {TEACHER: STEPS + 3}),
        ({"teacher": {"sleep": True, "follow": {"ema": 0.5}}}, {TEACHER}, {TEACHER: STEPS + 3 + 1 + STEPS}),
        ({"teacher": {"sleep": True}, "algorithm": {"name": "dskd"}}, {TEACHER}, {TEACHER: STEPS + 3}),
        ({"rollout": {"sleep": True, "fraction": 0.5}}, {ROLLOUT}, {ROLLOUT: STEPS}),
        ({"rollout": {"sleep": True, "sync_every": 3}, "teacher": {"sleep": True, "follow": {"every": 2}},
          "student": {"lora": {"rank": 4}}}, {TEACHER, ROLLOUT}, {TEACHER: STEPS + 3 + 1 + 2, ROLLOUT: STEPS}),
    ],
    ids=["teacher", "a teacher that follows", "embeddings", "rollouts", "both"],
)  # fmt: skip
def test_engines_that_sleep_between_their_turns_change_nothing(
    on_policy: RunFile, tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: Turns,
    sections: dict[str, Any], asleep: set[str], begun: dict[str, int],
) -> None:  # fmt: skip
    """Several micro-batches a step, and a student that can tell when an engine is in its way."""
    backward, met = Student.backward, list[set[str]]()

    def learns(*arguments: Any) -> Any:
        met.append(set(turns.away))
        return backward(*arguments)

    monkeypatch.setattr(Student, "backward", learns)
    training = {"steps": STEPS, "evaluate_every": 2, "learning_rate": 3e-2, "schedule": "constant", "warmup": 0}
    made = on_policy(data={**on_policy()["data"], "max_tokens": 128}, training=training)
    made["algorithm"] = sections.get("algorithm", {"name": "forward_kl", "ce_weight": 0.5})
    made["student"] |= sections.get("student", {})
    rollout = {"max_new_tokens": 8, **sections["rollout"]} if "rollout" in sections else None
    follows = "follow" in sections.get("teacher", {})
    teacher = {**({} if follows else {"model": tiny["teacher"]}), **sections.get("teacher", {})}
    found = {}
    for name, sleeps in (("asleep", True), ("awake", False)):
        met.clear()
        turns.away.clear()
        for section in (rollout, teacher):
            if section is not None and "sleep" in section:
                section["sleep"] = sleeps
        output = tmp_path / name
        kdflow.train({**made, "rollout": rollout, "teacher": teacher, "output": str(output)})
        found[name] = figures(output)
        assert met == [asleep if sleeps else set()] * len(met)
        assert len(met) > 2 * STEPS, "one micro-batch a step would not tell whether a turn is of all of them"
        assert turns.begun == begun, "woken once a turn, and never where a run does not ask for it"
    assert found["asleep"] == found["awake"]
    assert len(found["asleep"]) == STEPS + 3


@pytest.mark.parametrize("section", ["teacher", "rollout"])
def test_an_engine_that_cannot_sleep_is_refused(
    section: str, on_policy: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdflow.contracts import Engine
    from kdflow.engines.cache.teacher import CacheTeacher
    from kdflow.engines.transformers.rollout import TransformersRollout

    assert CacheTeacher.sleep is Engine.sleep
    monkeypatch.delattr(TransformersRollout, "sleep")
    made = on_policy()
    made[section] |= {"sleep": True, "engine": {"name": "cache" if section == "teacher" else "transformers"}}
    with pytest.raises(KdflowError, match=rf"{section}\.sleep: {section} engine '\w+' gives no memory of the device"):
        kdflow.train(made)
    assert not Path(made["output"]).exists()
