"""What every command does first: the run file is read and checked, before anything large is imported or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdflow import config as config_module
from kdflow import plugins as plugins_module
from kdflow.config import RolloutConfig, RunConfig
from kdflow.contracts import Algorithm, Engine, KdflowError
from kdflow.extras import require
from kdflow.plugins import Plugins, in_use
from kdflow.validation import validate_options


def prepare(
    run: str | Path | Mapping[str, Any], overrides: Sequence[str], block: Iterable[str]
) -> tuple[RunConfig, Plugins]:
    """The run file, checked against the plugins that it may use."""
    run_file = config_module.load(run, overrides)
    blocked = [block] if isinstance(block, str) else block  # a text is a name, not one of each letter
    plugins = plugins_module.load([*run_file.config.plugins.block, *blocked])
    config = run_file.resolve(plugins)
    with run_file.at("algorithm"):
        algorithm = make_algorithm(config, plugins)
    if "rollouts" in algorithm.needs and config.rollout is None:  # known of an instance alone, as all that is needed
        asked = run_file.config.model_copy(update={"rollout": RolloutConfig()})
        config = replace(run_file, config=asked).resolve(plugins)
    with run_file.at("algorithm"):
        if "aligner" in algorithm.needs:
            plugins.aligner(**algorithm.aligner)
    if "teacher" in algorithm.needs and config.teacher is None:  # its options may narrow what its class needs
        raise KdflowError(f"{run_file.source}: algorithm '{config.algorithm.name}' needs a teacher: add teacher.model")
    for section, engine in engines(config, plugins).items():
        if getattr(config, section).sleep and engine.sleep is Engine.sleep:
            with run_file.at(f"{section}.sleep"):
                raise KdflowError(f"{section} engine '{engine.name}' gives no memory of the device back; leave it out")
        if section == "rollout" or (config.teacher is not None and config.teacher.follow is not None):
            with run_file.at(f"{section}.engine"):
                choice = getattr(config, section).engine
                engine.require_updatable(engine.Options(**choice.options()))
        if getattr(engine, "stored", False) and config.rollout_fraction > 0:
            with run_file.at(f"{section}.engine"):
                raise KdflowError(
                    f"'{engine.name}' holds rows of the run's data alone, and the student is to write answers itself: "
                    "choose another teacher engine, or rollout.fraction: 0"
                )
    if config.training.epochs is not None and config.data.train[0].streaming:
        with run_file.at("training.epochs"):
            raise KdflowError("the size of streamed data is not known; give training.steps in its place")
    if config.student.lora is not None:
        require("peft", "lora", "student.lora")
    if config.training.optimizer == "adamw_8bit":
        require("torchao", "torchao", "training.optimizer: adamw_8bit")
    return config, plugins


def engines(config: RunConfig, plugins: Plugins) -> dict[str, type[Engine]]:
    """The classes of the engines that a run uses, by the sections that name them."""
    rollout = config.rollout if config.rollout_fraction > 0 else None
    sections = {"teacher": config.teacher, "rollout": rollout}
    return {name: plugins.find(one.engine.name, f"{name} engine").cls for name, one in sections.items() if one}


def make_algorithm(config: RunConfig, plugins: Plugins) -> Algorithm:
    """The algorithm that a run names, with its options."""
    choice = config.algorithm
    cls = plugins.algorithm(choice.name)
    options = validate_options(cls.Options, choice.options(), f"algorithm '{choice.name}'")
    with in_use(plugins):  # an algorithm may look for its divergence itself
        return cls(options)
