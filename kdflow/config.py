"""The run file: YAML, typed and strict, with overrides. Every fault names the file, the line or the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
import yaml

from kdflow.contracts import DatasetReader, Evaluator, KdflowError, Options, Tracker
from kdflow.plugins import Plugins, faults, nearest


class Choice(Options):
    """A plugin by name, with options that its own model checks."""

    model_config = pydantic.ConfigDict(extra="allow")
    name: str

    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


ChoiceT = TypeVar("ChoiceT", bound=Choice)


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

    path: str
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


class TeacherConfig(Options):
    """The model that is learnt from."""

    model: str
    """A local directory or a hub id."""
    engine: Choice = Choice(name="transformers")
    """What runs it."""


class SourceConfig(Options):
    """One source of samples; further keys are options of its format."""

    model_config = pydantic.ConfigDict(extra="allow")
    path: str
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
    """Processes that tokenize; null: one a core, fewer for little data."""

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


class PluginsConfig(Options):
    """Which plugins are loaded."""

    block: list[str] = pydantic.Field(default=[])
    """Entry points or distributions that are not loaded."""


class RunConfig(Options):
    """A whole run file."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    algorithm: Choice
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: list[EvaluatorChoice] = pydantic.Field(default=[])
    """What ``kdflow evaluate`` asks of a model: [{name: exact_match, path: eval.jsonl}]."""
    tracking: list[TrackerChoice] = pydantic.Field(default=[TrackerChoice(name="console"), TrackerChoice(name="jsonl")])
    """Trackers, each by its name or, with options, as a section: ``[console, {name: wandb, project: x}]``."""
    plugins: PluginsConfig = PluginsConfig()
    output: str
    """The run directory."""
    seed: int = pydantic.Field(default=0, ge=0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every default written out."""
        return self.model_dump(mode="json")

    def as_yaml(self) -> str:
        """The same as a run file, which reads back to this very configuration."""
        return yaml.dump(self.as_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load(run: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunFile:
    """Read and check a run file.

    Args:
        run: path of a YAML file, or its content as a mapping.
        overrides: ``key=value`` with dotted keys, such as ``training.steps=50``; the value is YAML.

    Raises:
        KdflowError: the file is missing, is no YAML, has a key twice, or does not fit; names file, line and key.
    """
    if isinstance(run, Mapping):
        source, content, places = "run", _copy(run), {}
    else:
        source = str(run)
        content, lines = _read(Path(run))
        places = {key: f"{source}:{line}" for key, line in lines.items()}
    for override in overrides:
        key = _override(content, override)
        kept = {other: place for other, place in places.items() if not f"{other}.".startswith(f"{key}.")}
        opened = dict.fromkeys(accumulate(key.split("."), "{}.{}".format), f"override '{override}'")
        places = {**opened, **kept}
    try:
        config = RunConfig(**content)
    except pydantic.ValidationError as error:
        found = faults(error, RunConfig)
        raise KdflowError("\n".join(_located(source, key, text, places) for key, text in found)) from None
    return RunFile(config, source, places)


@dataclass(frozen=True)
class RunFile:
    """A run file that has been read: its content, where it came from, and the file and line of each dotted key."""

    config: RunConfig
    source: str
    places: Mapping[str, str]

    def resolve(self, plugins: Plugins) -> RunConfig:
        """The run file with the options of the plugins it selects checked and written out.

        Raises:
            KdflowError: a plugin is unknown or an option does not fit; names file, line and key.
        """
        config = self.config
        with self._at("algorithm.name"):
            algorithm = plugins.algorithm(config.algorithm.name)
        changes: dict[str, Any] = {"algorithm": self._choice(config.algorithm, algorithm.Options, "algorithm")}
        if config.teacher is not None:
            engine = config.teacher.engine
            with self._at("teacher.engine.name"):
                model = plugins.find(engine.name, "teacher engine").cls.Options  # type: ignore[attr-defined]
            changes["teacher"] = config.teacher.model_copy(
                update={"engine": self._choice(engine, model, "teacher.engine")}
            )
        data = {part: [self._source(source, plugins, f"data.{part}.{index}") for index, source in enumerate(sources)]
                for part, sources in (("train", config.data.train), ("eval", config.data.eval))}  # fmt: skip
        changes["data"] = config.data.model_copy(update=data)
        changes["tracking"] = self._trackers(plugins)
        changes["evaluation"] = [self._evaluator(choice, plugins, n) for n, choice in enumerate(config.evaluation)]
        return config.model_copy(update=changes)

    def _evaluator(self, choice: EvaluatorChoice, plugins: Plugins, number: int) -> EvaluatorChoice:
        with self._at(f"evaluation.{number}.name"):
            cls: type[Evaluator] = plugins.find(choice.name, "evaluator").cls
        options = self._options(choice.name, choice.options(), cls.Options, f"evaluation.{number}", ("path",))
        return EvaluatorChoice(name=choice.name, path=choice.path, **options.model_dump())

    def _trackers(self, plugins: Plugins) -> list[TrackerChoice]:
        found: dict[str, TrackerChoice] = {}
        for index, tracker in enumerate(self.config.tracking):
            with self._at(f"tracking.{index}"):
                cls: type[Tracker] = plugins.find(tracker.name, "tracker").cls
                if tracker.name in found:
                    raise KdflowError(f"tracker '{tracker.name}' stands here a second time; keep one")
            found[tracker.name] = self._choice(tracker, cls.Options, f"tracking.{index}")
        return list(found.values())

    def _source(self, source: SourceConfig, plugins: Plugins, key: str) -> SourceConfig:
        with self._at(f"{key}.format"):
            reader: type[DatasetReader] = plugins.find(source.format, "data format").cls
        options = self._options(source.format, source.options(), reader.Options, key, SourceConfig.model_fields)
        given = source.model_dump(exclude_unset=True, exclude=set(source.options()))
        return SourceConfig(**given, **options.model_dump())

    def _choice(self, choice: ChoiceT, model: type[Options], key: str) -> ChoiceT:
        return type(choice)(name=choice.name, **self._options(choice.name, choice.options(), model, key).model_dump())

    def _options(
        self, name: str, values: Mapping[str, Any], model: type[Options], key: str, also: Iterable[str] = ()
    ) -> Options:
        """The options of the plugin ``name``, checked by its own model; ``also`` are keys that stand beside them."""
        try:
            return model(**values)
        except pydantic.ValidationError as error:
            found = [(f"{key}.{option}" if option else key, text) for option, text in faults(error, model, also)]
            told = [_located(self.source, where, f"{text} ('{name}')", self.places) for where, text in found]
            raise KdflowError("\n".join(told)) from None

    @contextmanager
    def _at(self, key: str) -> Iterator[None]:
        """An error in the block is one of ``key``."""
        try:
            yield
        except KdflowError as error:
            raise KdflowError(_located(self.source, key, str(error), self.places)) from None


def _located(source: str, key: str, text: str, places: Mapping[str, str]) -> str:
    """``text`` with the key and its place; a key that is missing has the place of its section."""
    at = key
    while at and at not in places:
        at = at.rpartition(".")[0]
    return ": ".join(part for part in (places.get(at, source), key, text) if part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _override(content: dict[str, Any], override: str) -> str:
    """Apply an override, and return its key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise KdflowError(f"override '{override}' must be KEY=VALUE, such as training.steps=50")
    *parents, last = key.split(".")
    at: Any = content
    for part in parents:
        at = at[_index(at, part, key)] if isinstance(at, list) else at.setdefault(part, {})
        if at is None or not isinstance(at, dict | list):
            raise KdflowError(f"override '{override}': '{part}' holds a value, not a section")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise KdflowError(f"override '{override}': the value is no YAML: {_problem(error)}") from None
    if isinstance(at, list):
        at[_index(at, last, key)] = parsed
    else:
        at[last] = parsed
    return key


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise KdflowError(f"override '{key}': '{part}' must be a number below {len(items)}, an entry of the list")
    return int(part)


# --- YAML ------------------------------------------------------------------------------------------------------------


_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)$|0x[\da-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d[\d_]*(\.\d*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: ``1e-5`` is a number; ``on``, ``1:30`` and ``2026-01-31`` are words."""

    yaml_implicit_resolvers: Any = {  # noqa: RUF012 - PyYAML's own name
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(f"{_TAG}bool", _BOOL, list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes a text such as ``'1e5'``, which only :class:`_Loader` takes for a number."""


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KdflowError(f"{path}: there is no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KdflowError(f"{path}: cannot be read: {error}") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        _scan(node, "", str(path), lines)
        content = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise KdflowError(f"{where}: this is no YAML: {_problem(error)}") from None
    except RecursionError:
        raise KdflowError(f"{path}: an alias (*NAME) stands inside the value that it repeats") from None
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        raise KdflowError(f"{path}: a run file is a mapping with the keys {', '.join(RunConfig.model_fields)}")
    return _copy(content), lines  # aliases become values of their own, which overrides change one by one


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error)


def _scan(node: yaml.Node | None, prefix: str, path: str, lines: dict[str, int]) -> None:
    """Note the line of each key, and refuse a key that stands twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if name in lines:
                raise KdflowError(f"{path}:{line}: the key '{name}' stands here and in line {lines[name]}; keep one")
            lines[name] = line
            _scan(value, f"{name}.", path, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault(f"{prefix}{index}", item.start_mark.line + 1)
            _scan(item, f"{prefix}{index}.", path, lines)
