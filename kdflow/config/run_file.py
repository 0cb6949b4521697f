"""A run file as it is read: from YAML, with overrides; every fault names the file, the line or the key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from kdflow.config.sections import Choice, EvaluatorChoice, RolloutConfig, RunConfig, SourceConfig, TrackerChoice
from kdflow.config.yaml_file import parse, read
from kdflow.contracts import DatasetReader, Evaluator, KdflowError, Options, Tracker
from kdflow.plugins import Plugins
from kdflow.validation import faults

ChoiceT = TypeVar("ChoiceT", bound=Choice)


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
        found, lines = read(Path(run))
        if not isinstance(found, dict):
            raise KdflowError(f"{run}: a run file is a mapping with the keys {', '.join(RunConfig.model_fields)}")
        content = _copy(found)  # aliases become values of their own, which overrides change one by one
        places = {key: f"{source}:{line}" for key, line in lines.items()}
    for override in overrides:
        key = _override(content, override)
        kept = {other: place for other, place in places.items() if not f"{other}.".startswith(f"{key}.")}
        opened = dict.fromkeys(accumulate(key.split("."), "{}.{}".format), f"override '{override}'")
        places = {**opened, **kept}
    try:
        config = RunConfig(**content)
    except pydantic.ValidationError as error:
        told = (_located(source, key, text, places) for key, text in faults(error, RunConfig))
        raise KdflowError("\n".join(told)) from None
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
        with self.at("algorithm.name"):
            algorithm = plugins.algorithm(config.algorithm.name)
        changes: dict[str, Any] = {"algorithm": self._choice(config.algorithm, algorithm.Options, "algorithm")}
        if config.teacher is not None:
            engine = config.teacher.engine
            with self.at("teacher.engine.name"):
                model = plugins.find(engine.name, "teacher engine").cls.Options
            changes["teacher"] = config.teacher.model_copy(
                update={"engine": self._choice(engine, model, "teacher.engine")}
            )
        data = {part: [self._source(source, plugins, f"data.{part}.{index}") for index, source in enumerate(sources)]
                for part, sources in (("train", config.data.train), ("eval", config.data.eval))}  # fmt: skip
        changes["data"] = config.data.model_copy(update=data)
        changes["rollout"] = self._rollout(changes["algorithm"], plugins)
        if changes["rollout"] is not None and "on_policy" in (options := changes["algorithm"].options()):
            options["on_policy"] = changes["rollout"].fraction
            changes["algorithm"] = Choice(name=config.algorithm.name, **options)
        changes["tracking"] = self._trackers(plugins)
        changes["evaluation"] = [self._evaluator(choice, plugins, n) for n, choice in enumerate(config.evaluation)]
        return config.model_copy(update=changes)

    def _rollout(self, algorithm: Choice, plugins: Plugins) -> RolloutConfig | None:
        """The section with its share written out, which an algorithm's option ``on_policy`` may say as well."""
        rollout, asked = self.config.rollout, algorithm.options().get("on_policy")
        if asked is not None and (not isinstance(asked, int | float) or not 0 <= asked <= 1):
            text = f"must be a share of the samples, from 0 to 1, or null, not {asked!r} ('{algorithm.name}')"
            raise KdflowError(_located(self.source, "algorithm.on_policy", text, self.places))
        if rollout is None:
            if asked is None:
                return None
            rollout = RolloutConfig()
        written = self.config.algorithm.options().get("on_policy")
        if None not in (written, rollout.fraction) and written != rollout.fraction:
            text = f"is {rollout.fraction} and algorithm.on_policy is {written}, which mean the same share; keep one"
            raise KdflowError(_located(self.source, "rollout.fraction", text, self.places))
        fraction = next(share for share in (rollout.fraction, asked, 1.0) if share is not None)
        with self.at("rollout.engine.name"):
            model = plugins.find(rollout.engine.name, "rollout engine").cls.Options
        engine = self._choice(rollout.engine, model, "rollout.engine")
        return rollout.model_copy(update={"fraction": fraction, "engine": engine})

    def _evaluator(self, choice: EvaluatorChoice, plugins: Plugins, number: int) -> EvaluatorChoice:
        with self.at(f"evaluation.{number}.name"):
            cls: type[Evaluator] = plugins.find(choice.name, "evaluator").cls
        options = self._options(choice.name, choice.options(), cls.Options, f"evaluation.{number}", ("path",))
        return EvaluatorChoice(name=choice.name, path=choice.path, **options.model_dump())

    def _trackers(self, plugins: Plugins) -> list[TrackerChoice]:
        found: dict[str, TrackerChoice] = {}
        for index, tracker in enumerate(self.config.tracking):
            with self.at(f"tracking.{index}"):
                cls: type[Tracker] = plugins.find(tracker.name, "tracker").cls
                if tracker.name in found:
                    raise KdflowError(f"tracker '{tracker.name}' stands here a second time; keep one")
            found[tracker.name] = self._choice(tracker, cls.Options, f"tracking.{index}")
        return list(found.values())

    def _source(self, source: SourceConfig, plugins: Plugins, key: str) -> SourceConfig:
        with self.at(f"{key}.format"):
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
    def at(self, key: str) -> Iterator[None]:
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
    *parents, last = path = key.split(".")
    at: Any = content
    for depth, part in enumerate(parents):
        if isinstance(at, dict) and at.get(part) is None:
            at[part] = {}  # also where a run directory's own file says null
        at = at[_index(at, path, depth, value) if isinstance(at, list) else part]
        if not isinstance(at, dict | list):
            raise KdflowError(f"override '{override}': '{part}' holds a value, not a section")
    try:
        parsed = parse(value)
    except ValueError as error:
        raise KdflowError(f"override '{override}': the value is no YAML: {error}") from None
    if isinstance(at, list):
        at[_index(at, path, len(parents), value)] = parsed
    else:
        at[last] = parsed
    return key


def _index(items: list[Any], path: list[str], depth: int, value: str) -> int:
    key, part = ".".join(path), path[depth]
    if not items:
        at, entry = ".".join(path[:depth]), value
        for inner in reversed(path[depth + 1 :]):
            entry = f"{{{inner}: {entry}}}"
        raise KdflowError(f"override '{key}': {at} is an empty list; give it whole, such as '{at}=[{entry}]'")
    if not part.isdecimal() or int(part) >= len(items):
        raise KdflowError(f"override '{key}': '{part}' must be a number below {len(items)}, an entry of the list")
    return int(part)
