"""What the README shows works: the run file is valid, and the algorithm that it writes trains."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import kdflow
from kdflow import config, plugins
from kdflow.testing import check_divergence
from tests.support.commands import site
from tests.support.distributions import plugin
from tests.support.runs import events

__all__ = ["site"]

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(block for block in blocks if containing in block)


def test_the_run_file_is_valid(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(_block("yaml", "student:"), encoding="utf-8")
    resolved = config.load(file).resolve(plugins.load())
    assert resolved.training.learning_rate == 1e-5


def test_the_data_section_is_valid(run_file: Callable[..., dict[str, Any]]) -> None:
    data = yaml.safe_load(_block("yaml", "ultrachat"))["data"]
    resolved = config.load(run_file(data=data)).resolve(plugins.load())
    assert resolved.data.train[0].fields == {"prompt": "question", "response": "answer"}
    assert resolved.data.train[1].options()["turns"] == "last"


def test_the_evaluators_are_valid(run_file: Callable[..., dict[str, Any]]) -> None:
    evaluation = yaml.safe_load(_block("yaml", "exact_match"))["evaluation"]
    assert [choice.name for choice in config.load(run_file(evaluation=evaluation)).resolve(plugins.load()).evaluation]


def test_every_registered_algorithm_has_a_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE))
    assert {entry.name for entry in plugins.load().of_kind("algorithm", "divergence")} <= rows


def test_the_written_algorithm_trains(run_file: Callable[..., dict[str, Any]], site: Path) -> None:
    source = _block("python", "class Squared")
    module = types.ModuleType("readme_squared")
    exec(source, module.__dict__)
    check_divergence(module.Squared())

    plugin("kdflow_squared", source).install(site)
    result = kdflow.train(run_file(algorithm={"name": "squared", "factor": 2.0}))
    losses = [event["loss"] for event in events(result.output, "step")]
    assert losses[-1] < losses[0]
