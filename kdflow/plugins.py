"""Discovery of plugins: entry points, blocking, provenance, name clashes and load errors.

There is no global manager: :func:`load` makes a fresh :class:`Plugins`. It iterates the entry points itself, since
pluggy's own loader stops at the first broken plugin and skips, silently, the second distribution that uses an
entry-point name.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pluggy
import pydantic

from kdflow import contracts, hookspecs
from kdflow._version import __version__
from kdflow.contracts import Algorithm, Aligner, Divergence, DivergenceOptions, KdflowError, Options
from kdflow.validation import nearest, require_sound, validate_options

GROUP = "kdflow"
_log = logging.getLogger("kdflow")

# Rooms of kdflow without which there is no run. They speak through the same hooks but are no entry points: nobody can
# block them, and a kdflow whose algorithms were all taken out still trains with somebody else's.
CORE = (
    "kdflow.data.formats",
    "kdflow.engines.cache",
    "kdflow.engines.sglang",
    "kdflow.engines.transformers",
    "kdflow.evaluation.exact_match",
    "kdflow.evaluation.multiple_choice",
    "kdflow.runtime.trackers",
)

# What each hook yields, under the word that errors use for it.
KINDS: dict[str, tuple[str, type]] = {
    "kdflow_divergences": ("divergence", Divergence),
    "kdflow_algorithms": ("algorithm", Algorithm),
    "kdflow_aligners": ("aligner", Aligner),
    "kdflow_teachers": ("teacher engine", contracts.TeacherEngine),
    "kdflow_rollouts": ("rollout engine", contracts.RolloutEngine),
    "kdflow_datasets": ("data format", contracts.DatasetReader),
    "kdflow_trackers": ("tracker", contracts.Tracker),
    "kdflow_evaluators": ("evaluator", contracts.Evaluator),
}

# Keys of the run file that stand beside the options of a kind; of the others it is the name alone.
BESIDE: dict[str, frozenset[str]] = {
    "divergence": frozenset({"name", *DivergenceOptions.model_fields, "ce_weight"}),
    "data format": frozenset(
        {"name", "path", "format", "config", "split", "revision", "fields", "weight", "streaming"}
    ),
    "evaluator": frozenset({"name", "path"}),
}


@dataclass
class Plugin:
    """One entry point, and what became of it."""

    name: str
    module: str
    distribution: str
    version: str
    status: Literal["loaded", "blocked", "failed"] = "loaded"
    error: str | None = None
    provides: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """For error messages."""
        return f"plugin '{self.name}' of distribution '{self.distribution} {self.version}'"


@dataclass(frozen=True)
class Registered:
    """A class that a plugin provides under a name."""

    name: str
    kind: str
    cls: type[Any]
    plugin: Plugin


class Plugins:
    """All plugins that are installed, and the classes they provide, by kind and name."""

    def __init__(self, plugins: list[Plugin], registered: dict[str, dict[str, Registered]]) -> None:
        self.plugins = plugins
        self._registered = registered

    def of_kind(self, *kinds: str) -> list[Registered]:
        """Everything of the given kinds, by name."""
        found = [entry for kind in kinds for entry in self._registered[kind].values()]
        return sorted(found, key=lambda entry: entry.name)

    def find(self, name: str, *kinds: str) -> Registered:
        """The class called ``name``.

        Raises:
            KdflowError: there is none; names near ones, all that are installed, and the plugins that failed to load.
        """
        for kind in kinds:
            if name in self._registered[kind]:
                return self._registered[kind][name]
        raise KdflowError(self._unknown(name, kinds))

    def algorithm(self, name: str) -> type[Algorithm]:
        """An algorithm's class; a divergence's name gives the algorithm that minimises it."""
        entry = self.find(name, "algorithm", "divergence")
        cls: type[Divergence] = entry.cls
        return entry.cls if entry.kind == "algorithm" else minimise(cls)

    def divergence(self, name: str, **options: Any) -> Divergence:
        """A divergence with its options, among them ``temperature`` and ``scale_by_temperature_squared``."""
        cls: type[Divergence] = self.find(name, "divergence").cls
        return cls.configured(validate_options(divergence_options(cls), options, f"divergence '{name}'"))

    def aligner(self, name: str, **options: Any) -> Aligner:
        """An aligner with its options."""
        cls, checked = self.configured("aligner", name, options)
        made: Aligner = cls(checked)
        return made

    def configured(self, kind: str, name: str, options: Mapping[str, Any]) -> tuple[type[Any], Any]:
        """The class of a kind that is called ``name``, and its options, checked.

        Raises:
            KdflowError: there is none, or an option does not fit.
        """
        cls = self.find(name, kind).cls
        return cls, validate_options(cls.Options, options, f"{kind} '{name}'")

    def _unknown(self, name: str, kinds: Sequence[str]) -> str:
        installed = [entry.name for entry in self.of_kind(*kinds)]
        near = nearest(name, installed)
        text = f"{kinds[0]} '{name}' is not registered{near or '.'} Installed: {', '.join(installed) or 'none'}."
        if not near:
            text += " If it comes from another package, install that into this Python's environment."
        for plugin in self.plugins:
            if plugin.status == "failed":
                text += f"\n{plugin.origin} failed to load and may be the one that provides it: {plugin.error}"
            elif plugin.status == "blocked":
                text += f"\n{plugin.origin} is blocked."
        return text


def load(block: Iterable[str] = ()) -> Plugins:
    """Load every plugin but those that ``block`` names, by entry point or by distribution.

    A plugin that cannot be imported, or whose hooks are not hooks of kdflow, is kept with its error and nothing else.

    Raises:
        KdflowError: two distributions use one entry-point name, or two plugins one algorithm name.
    """
    found = _entry_points()
    blocked = {_normal(name) for name in block}
    for name in blocked - {_normal(known) for plugin, _ in found for known in (plugin.name, plugin.distribution)}:
        _log.warning(f"nothing that is installed is called '{name}': there is nothing to block")
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    registered: dict[str, dict[str, Registered]] = {kind: {} for kind, _ in KINDS.values()}
    own = Plugin("core", "kdflow", "kdflow", __version__)
    for module in CORE:
        _collect(manager, own, importlib.import_module(module), registered)
    loaded = Plugins(plugins, registered)
    with in_use(loaded):  # options that are looked at may ask for other plugins
        for plugin, entry_point in found:
            plugins.append(plugin)
            if {_normal(plugin.name), _normal(plugin.distribution)} & blocked:
                plugin.status = "blocked"
                continue
            if twin := next((other for other in plugins[:-1] if _same_name(other, plugin)), None):
                raise KdflowError(
                    f"two distributions register a plugin called '{plugin.name}': '{twin.distribution} {twin.version}' "
                    f"and '{plugin.distribution} {plugin.version}'. Uninstall one, or block one, as with "
                    f"-p no:{plugin.distribution}."
                )
            try:
                module_or_object = entry_point.load()
            except (Exception, SystemExit) as error:
                _fail(plugin, error)
                continue
            _collect(manager, plugin, module_or_object, registered)
    return loaded


def installed() -> list[Plugin]:
    """Every plugin that is installed, without loading any."""
    return [plugin for plugin, _ in _entry_points()]


def _entry_points() -> list[tuple[Plugin, metadata.EntryPoint]]:
    found = []
    for entry_point in metadata.entry_points(group=GROUP):
        name = entry_point.dist.metadata["Name"] if entry_point.dist else "unknown"
        version = entry_point.dist.version if entry_point.dist else "unknown"
        found.append((Plugin(entry_point.name, entry_point.value, name, version), entry_point))
    return sorted(found, key=lambda item: (item[0].distribution != "kdflow", item[0].distribution, item[0].name))


def _same_name(one: Plugin, other: Plugin) -> bool:
    return one.status != "blocked" and one.name == other.name and one.distribution != other.distribution


def _collect(
    manager: pluggy.PluginManager, plugin: Plugin, module: Any, registered: dict[str, dict[str, Registered]]
) -> None:
    """Register one plugin and read what its hooks return; whatever goes wrong is this plugin's fault alone."""
    try:
        hooks = _hooks_of(module)
        manager.register(module, name=f"{plugin.distribution}:{getattr(module, '__name__', plugin.name)}")
        entries = [_registered(cls, hook, plugin) for hook, function in hooks.items() for cls in _yield(hook, function)]
    except (Exception, SystemExit) as error:
        if (plugin.name, plugin.distribution) == ("core", "kdflow"):
            raise
        _fail(plugin, error)
        return
    for entry in entries:
        # An algorithm and a divergence are both selected by `algorithm.name`: they share one space of names.
        shared = ("algorithm", "divergence") if entry.kind in ("algorithm", "divergence") else (entry.kind,)
        for kind in shared:
            if (twin := registered[kind].get(entry.name)) is not None:
                raise KdflowError(
                    f"two plugins register the {entry.kind} '{entry.name}': {_provider(twin)} and {_provider(entry)}. "
                    f"Uninstall one, or block one, as with -p no:{plugin.name}."
                )
        registered[entry.kind][entry.name] = entry
    provides = tuple(f"{entry.kind} {entry.name}" for entry in entries)
    plugin.provides += provides
    _log.debug(f"{plugin.origin} provides {', '.join(provides)}")


def _provider(entry: Registered) -> str:
    return f"{entry.cls.__module__}.{entry.cls.__qualname__} ({entry.plugin.origin})"


def _hooks_of(module: Any) -> dict[str, Callable[[], Iterable[type]]]:
    """The hook implementations of a plugin, each checked against its specification."""
    hooks: dict[str, Callable[[], Iterable[type]]] = {}
    for name in dir(module):
        function = getattr(module, name)
        if not inspect.isroutine(function):
            continue
        if getattr(function, f"{GROUP}_impl", None) is None:
            if name in KINDS:
                raise ValueError(f"{name} is not marked as a hook: put @kdflow.hookimpl above it")
            continue
        if name not in KINDS:
            hint = nearest(name, KINDS) or f". Hooks: {', '.join(KINDS)}."
            raise ValueError(f"'{name}' is not a hook of kdflow{hint}")
        if inspect.signature(function).parameters:
            raise ValueError(f"{name} takes no arguments, but is defined with {inspect.signature(function)}")
        hooks[name] = function
    if not hooks:
        raise ValueError(f"it implements no hook. Hooks: {', '.join(KINDS)}.")
    return hooks


def _yield(hook: str, function: Callable[[], Any]) -> Iterable[Any]:
    """What a hook returns."""
    classes = function()
    if isinstance(classes, type) or not isinstance(classes, Iterable):
        raise TypeError(f"{hook} must return a list of classes, but returned {classes!r}")
    return classes


def _registered(cls: Any, hook: str, plugin: Plugin) -> Registered:
    """Check one class that a hook returned."""
    kind, base = KINDS[hook]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{hook} must return subclasses of kdflow.{base.__name__}, but returned {cls!r}")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{cls.__qualname__}.name must be lower-case letters, digits and '_', not {name!r}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise TypeError(f"{cls.__qualname__} lacks {', '.join(missing)}")
    options = getattr(cls, "Options", Options)
    if not (isinstance(options, type) and issubclass(options, Options)):
        raise TypeError(f"{cls.__qualname__}.Options must be a subclass of kdflow.Options")
    if collision := sorted(BESIDE.get(kind, frozenset({"name"})) & set(options.model_fields)):
        raise ValueError(f"{cls.__qualname__}.Options may not define {', '.join(collision)}: every {kind} has that")
    require_sound(options, f"{cls.__qualname__}.Options")
    if issubclass(cls, Algorithm):
        needs: Any = cls.needs
        if isinstance(needs, str):
            raise TypeError(f"{cls.__qualname__}.needs must be a set of words, such as frozenset({{'{needs}'}})")
        if unknown := sorted(set(needs) - contracts.NEEDS):
            known = ", ".join(sorted(contracts.NEEDS))
            raise ValueError(f"{cls.__qualname__}.needs {', '.join(unknown)}; known needs: {known}")
    return Registered(name, kind, cls, plugin)


def _fail(plugin: Plugin, error: BaseException) -> None:
    plugin.status, plugin.error = "failed", f"{type(error).__name__}: {error}".rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    if frames and (file := Path(frames[-1].filename)) != Path(__file__):
        plugin.error += f" ({file.name}:{frames[-1].lineno})"
    _log.info(f"{plugin.origin} failed to load: {plugin.error}")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- options and instances -------------------------------------------------------------------------------------------


@cache
def divergence_options(cls: type[Divergence]) -> type[Options]:
    """The divergence's own options and those that every divergence has, as one strict model."""
    return pydantic.create_model(f"{cls.__name__}Options", __base__=(DivergenceOptions, cls.Options))


@cache
def minimise(cls: type[Divergence]) -> type[Algorithm]:
    """The complete algorithm that a divergence is."""
    from kdflow.ops.kd import DivergenceAlgorithm, KDOptions

    options = pydantic.create_model(f"{cls.__name__}Options", __base__=(KDOptions, cls.Options))
    body = {"name": cls.name, "paper": cls.paper, "Options": options, "divergence_class": cls, "__doc__": cls.__doc__}
    return type(cls.__name__, (DivergenceAlgorithm,), body)


# --- the short way ---------------------------------------------------------------------------------------------------

_in_use: ContextVar[Plugins | None] = ContextVar("plugins", default=None)


@contextmanager
def in_use(plugins: Plugins) -> Iterator[None]:
    """Inside the block, what is looked up the short way is looked up among these: what a run blocks, stays blocked."""
    token = _in_use.set(plugins)
    try:
        yield
    finally:
        _in_use.reset(token)


def get_divergence(name: str, **options: Any) -> Divergence:
    """A divergence to be called with logits: ``get_divergence("skew_kl", skew=0.1)(student, teacher) -> [n]``."""
    return (_in_use.get() or load()).divergence(name, **options)


def get_algorithm(name: str) -> type[Algorithm]:
    """An algorithm's class, with ``Options``, ``needs`` and ``paper``."""
    return (_in_use.get() or load()).algorithm(name)


def get_aligner(name: str, **options: Any) -> Aligner:
    """An aligner with its options."""
    return (_in_use.get() or load()).aligner(name, **options)


def plugin_set(plugins: Plugins) -> dict[str, str]:
    """Entry point → distribution and version of what is loaded; compared across ranks, kept in checkpoints."""
    loaded = [plugin for plugin in plugins.plugins if plugin.status == "loaded"]
    return {plugin.name: f"{plugin.distribution} {plugin.version}" for plugin in loaded}
