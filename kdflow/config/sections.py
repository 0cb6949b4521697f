"""The sections of a run file, typed and strict."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from kdflow.config.yaml_file import dump
from kdflow.contracts import Options
from kdflow.validation import nearest


def _path(value: str) -> str:
    if not value or "\0" in value:  # which would be the directory that the command runs in, or no path at all
        raise ValueError(f"must be a path, not {value!r}")
    return os.path.expanduser(value)  # ~ is the home directory, as a shell has it


HomePath = Annotated[str, pydantic.AfterValidator(_path)]


class Choice(Options):
    """A plugin by name, with options that its own model checks."""

    model_config = pydantic.ConfigDict(extra="allow")
    name: str

    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class TrackerChoice(Choice):
    """A tracker: its name alone, or a section with its name and its options."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _may_be_a_name(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, Mapping | TrackerChoice):
            raise ValueError(f"must be a tracker's name, or a section with its name and options, not {value!r}")
        return value

    @pydantic.model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return {"name": self.name, **self.options()} if self.options() else self.name


class EvaluatorChoice(Choice):
    """An evaluator by name, the questions it asks, and its options."""

    path: HomePath
    """A file of questions, or what else a source of data may be."""


class LoraConfig(Options):
    """Low-rank adapters, which are trained in place of the student's own weights (LoRA)."""

    rank: int = pydantic.Field(default=16, ge=1)
    """Inner size of the adapters."""
    alpha: int = pydantic.Field(default=32, ge=1)
    """What an adapter gives is multiplied by alpha / rank."""
    dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Of the adapters' inputs."""
    targets: str | list[str] = "all-linear"
    """Which layers: all linear ones of the blocks, or some of them by name, such as [q_proj, v_proj]."""

    @pydantic.field_validator("targets", mode="before")
    @classmethod
    def _are_layers(cls, value: object) -> object:
        names = isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)
        if not names and value != "all-linear":
            raise ValueError(f"must be all-linear, or a list of layers such as [q_proj, v_proj], not {value!r}")
        return value


class StudentConfig(Options):
    """The model that is trained."""

    model: str
    """A local directory or a hub id."""
    keep_layers: str | list[int] | None = None
    """Cut the student in depth: a slice such as "::3", or a list of layers."""
    lora: LoraConfig | None = None
    """Train adapters beside the frozen model; {} takes every default."""

    @pydantic.field_validator("keep_layers", mode="before")
    @classmethod
    def _is_a_choice_of_layers(cls, value: object) -> object:
        if isinstance(value, str):
            fits = re.fullmatch(r"(-?\d+)?:(-?\d+)?(:0*[1-9]\d*|:)?", value) is not None
        elif isinstance(value, list):
            fits = bool(value) and all(type(layer) is int for layer in value) and len(set(value)) == len(value)
        else:
            fits = value is None
        if not fits:
            raise ValueError(f"must be a slice such as '::3', or a list of layers, each of them once, not {value!r}")
        return value


class FollowConfig(Options):
    """How a teacher that is the student itself goes on with it (self-distillation)."""

    every: int | None = pydantic.Field(default=None, ge=1)
    """Steps after which it becomes the student as it is then."""
    ema: float | None = pydantic.Field(default=None, ge=0, lt=1)
    """After each step: this share of its own weights, and the rest of the student's (mean teacher)."""

    @pydantic.model_validator(mode="after")
    def _is_one_of_both(self) -> FollowConfig:
        if (self.every is None) == (self.ema is None):
            raise ValueError("give either every, a number of steps, or ema, a share such as 0.999")
        return self


class TeacherConfig(Options):
    """The model that is learnt from."""

    model: str
    """A local directory or a hub id; left out where the teacher follows the student."""
    engine: Choice = Choice(name="transformers")
    """What runs it."""
    follow: FollowConfig | None = None
    """The teacher is the student: {every: 100}, or {ema: 0.999}."""
    sleep: bool | None = None
    """Free the teacher's memory of the device while the student learns: for models that do not both fit. null: on a
    GPU where the memory plan says so."""


class SourceConfig(Options):
    """One source of samples; further keys are options of its format."""

    model_config = pydantic.ConfigDict(extra="allow")
    path: HomePath
    """A file (JSON lines, CSV, Parquet), a directory that ``datasets`` saved or can load, or a hub id."""
    format: str
    """What a record holds: chat, prompt_response, text, or a plugin's format."""
    config: str | None = None
    """Configuration of a data set of the hub, or of a directory laid out like one."""
    split: str = "train"
    """Its split."""
    revision: str | None = None
    """Branch, tag or commit of a data set of the hub."""
    fields: dict[str, str] = pydantic.Field(default={})
    """Where the format's fields are found: {prompt: question} reads the prompt from the record's ``question``."""
    weight: float = pydantic.Field(default=1.0, gt=0)
    """How often an epoch holds each of its samples; of streamed sources, its share."""
    streaming: bool = False
    """Read and tokenize while training, in the order of the source, shuffled a window at a time."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _is_spelt_right(cls, values: Any) -> Any:
        for needed in {"path", "format"} - set(values if isinstance(values, dict) else ("path", "format")):
            for key in values:
                if key not in cls.model_fields and (hint := nearest(key, [needed])):
                    raise ValueError(f"unknown key '{key}'{hint}")
        return values

    def options(self) -> dict[str, Any]:
        """What is the format's own."""
        return dict(self.model_extra or {})


class DataConfig(Options):
    """What is learnt from, and how it is cut into batches."""

    train: list[SourceConfig] = pydantic.Field(min_length=1)
    eval: list[SourceConfig] = pydantic.Field(default=[])
    """Held-out samples, for the evaluation before, during and after."""
    max_length: int = pydantic.Field(default=4096, ge=2)
    """Tokens of the longest sample."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to longer samples; either way they are counted."""
    max_tokens: int = pydantic.Field(default=4096, ge=2)
    """Tokens that one micro-batch may hold: several samples are packed into it."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record does that cannot be used: end the run before it begins, or be left out and listed."""
    workers: int | None = pydantic.Field(default=None, ge=1)
    """Processes that tokenize; null: one a core that it may use, fewer for little data."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.max_length > self.max_tokens:
            raise ValueError(
                f"max_length ({self.max_length}) must not exceed max_tokens ({self.max_tokens}): "
                "a sample must fit into a micro-batch"
            )
        if len({source.streaming for source in self.train}) > 1:
            raise ValueError("train: either all sources are streamed or none is")
        if any(source.streaming for source in self.eval):
            raise ValueError("eval: held-out samples are evaluated as a whole and cannot be streamed")
        return self


class TrainingConfig(Options):
    """How the student is trained."""

    steps: int | None = pydantic.Field(default=None, ge=1)
    """Optimizer steps; 1000 where ``epochs`` is not given either. Given both, whichever ends first."""
    epochs: float | None = pydantic.Field(default=None, gt=0)
    """How often the training data is gone through."""
    tokens_per_step: int = pydantic.Field(default=131072, ge=1)
    """A step is the shortest run of samples that reaches this many student tokens, prompts included, over all ranks."""
    learning_rate: float = pydantic.Field(default=1e-5, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What the learning rate does after the warm-up; the last two fall to zero."""
    warmup: float = pydantic.Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = pydantic.Field(default=0.0, ge=0)
    """AdamW's, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    clip_norm: float | None = pydantic.Field(default=1.0, gt=0)
    """Largest gradient norm; null leaves gradients as they are."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW with moments as wide as the parameters, or with 8-bit ones in blocks with a scale each (torchao)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in."""
    replicas: int = pydantic.Field(default=1, ge=1)
    """Groups of ranks that hold a whole student each, sharded inside the group (HSDP); one a machine keeps gathers off
    the network between them."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """What trained parameters and their moments are held in; updates of bf16 ones are rounded stochastically."""
    compile: bool = False
    """torch.compile the student's blocks."""
    activation_checkpointing: bool | int = False
    """Recompute blocks in the backward pass instead of keeping their activations: true for each, or every k-th."""
    head_chunk: int | None = pydantic.Field(default=None, ge=1)
    """Rows of logits that the head holds at a time; null chooses by the vocabulary."""
    checkpoint_every: int | None = pydantic.Field(default=200, ge=1)
    """Steps between checkpoints; there is always one at the end. Null: only that one."""
    keep_checkpoints: int = pydantic.Field(default=3, ge=1)
    """How many of the newest are kept."""
    evaluate_every: int | None = pydantic.Field(default=100, ge=1)
    """Steps between evaluations; there is always one before and one after. Null: only those."""

    @property
    def last_step(self) -> int:
        """The number of the last step; with ``epochs``, known once the data is."""
        assert self.steps is not None
        return self.steps

    @pydantic.model_validator(mode="before")
    @classmethod
    def _ends(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "steps": 1000}
        return values

    @pydantic.field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _is_a_switch_or_a_count(cls, value: object) -> object:
        if not isinstance(value, bool) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"must be true, false, or k, at least 1, for every k-th block, not {value!r}")
        return value

    @pydantic.field_validator("betas")
    @classmethod
    def _are_betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must lie in [0, 1)")
        return value


class RolloutConfig(Options):
    """Responses that the student writes itself while it is trained, in place of the data's (on-policy)."""

    fraction: float | None = pydantic.Field(default=None, ge=0, le=1)
    """Share of the samples, drawn by the seed; null: what the algorithm asks for, and all where it does not."""
    engine: Choice = Choice(name="transformers")
    """What runs the student's copy that writes."""
    max_new_tokens: int = pydantic.Field(default=512, ge=1)
    """Tokens of the longest response, the one that ends it included."""
    temperature: float = pydantic.Field(default=1.0, ge=0, allow_inf_nan=False)
    """Logits are divided by it; 0 takes the most likely token each time."""
    top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of most likely tokens whose probability reaches this."""
    n: int = pydantic.Field(default=1, ge=1)
    """Responses to each prompt."""
    stop: list[str] = pydantic.Field(default=[])
    """Texts that end a response where one first occurs; it is learnt as the last of the response."""
    sync_every: int = pydantic.Field(default=1, ge=1)
    """Steps between two copies of the student's weights to the engine."""
    sleep: bool | None = None
    """Free the engine's memory of the device while nothing is written: for what does not fit otherwise. null: on a GPU
    where the memory plan says so."""
    save: bool = False
    """Write what the student wrote to rollouts/*.jsonl of the run directory."""

    @pydantic.field_validator("stop")
    @classmethod
    def _stops_are_texts(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("a text that ends a response must not be empty")
        return value


class PluginsConfig(Options):
    """Which plugins are loaded."""

    block: list[str] = pydantic.Field(default=[])
    """Entry points or distributions that are not loaded."""


class RunConfig(Options):
    """A whole run file."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    algorithm: Choice
    rollout: RolloutConfig | None = None
    """There are none where this is null and the algorithm neither asks for a share nor needs them; one that needs them
    without a share of its own has all."""
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: list[EvaluatorChoice] = pydantic.Field(default=[])
    """What ``kdflow evaluate`` asks of a model: [{name: exact_match, path: eval.jsonl}]."""
    tracking: list[TrackerChoice] = pydantic.Field(default=[TrackerChoice(name="console"), TrackerChoice(name="jsonl")])
    """Trackers, each by its name or, with options, as a section: ``[console, {name: wandb, project: x}]``."""
    plugins: PluginsConfig = PluginsConfig()
    output: HomePath
    """The run directory."""
    seed: int = pydantic.Field(default=0, ge=0, lt=2**63)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _a_teacher_that_follows_is_the_student(cls, values: Any) -> Any:
        teacher, student = (values.get(name) if isinstance(values, dict) else None for name in ("teacher", "student"))
        if not isinstance(teacher, dict) or not isinstance(student, dict) or not teacher.get("follow"):
            return values
        model = student.get("model")
        if teacher.get("model") not in (None, model):
            raise ValueError("teacher.follow: such a teacher is the student itself; leave teacher.model out")
        return {**values, "teacher": {**teacher, "model": model}}

    @property
    def rollout_fraction(self) -> float:
        """Share of the samples that the student answers itself."""
        return 0.0 if self.rollout is None else self.rollout.fraction or 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every default written out."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """The same as a run file, which reads back to this very configuration."""
        return dump(self.as_dict())
