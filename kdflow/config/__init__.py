"""The run file: YAML, typed and strict, with overrides. Every fault names the file, the line or the key."""

from kdflow.config.run_file import RunFile, load
from kdflow.config.sections import (
    Choice,
    DataConfig,
    EvaluatorChoice,
    FollowConfig,
    LoraConfig,
    PluginsConfig,
    RolloutConfig,
    RunConfig,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    TrackerChoice,
    TrainingConfig,
)

__all__ = [
    "Choice",
    "DataConfig",
    "EvaluatorChoice",
    "FollowConfig",
    "LoraConfig",
    "PluginsConfig",
    "RolloutConfig",
    "RunConfig",
    "RunFile",
    "SourceConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrackerChoice",
    "TrainingConfig",
    "load",
]
