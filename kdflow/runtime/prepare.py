"""What every command does first: the run file is read and checked, before anything large is imported or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdflow import config as config_module
from kdflow import plugins as plugins_module
from kdflow.config import RolloutConfig, RunConfig, TeacherConfig
from kdflow.contracts import Algorithm, Engine, KdflowError
from kdflow.extras import require
from kdflow.plugins import Plugins, validate_options


def prepare(
    run: str | Path | Mapping[str, Any], overrides: Sequence[str], block: Iterable[str]
) -> tuple[RunConfig, Plugins]:
    """The run file, checked against the plugins that it may use."""
    run_file = config_module.load(run, overrides)
    plugins = plugins_module.load([*run_file.config.plugins.block, *block])
    config = run_file.resolve(plugins)
    if "teacher" in plugins.algorithm(config.algorithm.name).needs and config.teacher is None:
        raise KdflowError(f"{run_file.source}: algorithm '{config.algorithm.name}' needs a teacher: add teacher.model")
    for section in ("teacher", "rollout"):
        asked: TeacherConfig | RolloutConfig | None = getattr(config, section)
        if asked is not None and asked.sleep:
            engine: type[Engine] = plugins.find(asked.engine.name, f"{section} engine").cls
            if engine.sleep is Engine.sleep:
                raise KdflowError(
                    f"{run_file.source}: {section}.sleep: {section} engine '{engine.name}' gives no memory of the "
                    "device back; leave it out"
                )
    if config.student.lora is not None:
        require("peft", "lora", "student.lora")
    if config.training.optimizer == "adamw_8bit":
        require("torchao", "torchao", "training.optimizer: adamw_8bit")
    return config, plugins


def make_algorithm(config: RunConfig, plugins: Plugins) -> Algorithm:
    """The algorithm that a run names, with its options."""
    choice = config.algorithm
    cls = plugins.algorithm(choice.name)
    return cls(validate_options(cls.Options, choice.options(), f"algorithm '{choice.name}'"))
