"""Plugins as users have them: installed distributions, found through their entry points."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch

import kdflow
from kdflow import config, plugins
from kdflow.config import EvaluatorChoice, SourceConfig
from kdflow.contracts import KdflowError
from kdflow.runtime.checkpoint import load_tensors
from kdflow.runtime.run_directory import read_events
from tests.support.commands import Command, WriteRun, command, kdflow_process, one_thread, python, site, write_run
from tests.support.distributions import MIMIC, SQUARED, Distribution, divergence, plugin, strip_kdflow
from tests.support.models import write_jsonl

__all__ = ["command", "one_thread", "site", "write_run"]

BUILT_IN = {
    "adaptive_kl": "divergence", "forward_kl": "divergence", "jsd": "divergence", "reverse_kl": "divergence",
    "skew_kl": "divergence", "skew_reverse_kl": "divergence", "tvd": "divergence", "sorted_l1": "divergence",
    "sft": "algorithm", "uld": "algorithm", "min_edit": "algorithm", "dskd": "algorithm", "overlap": "algorithm",
    "gkd": "algorithm",
}  # fmt: skip
# Entry points of kdflow: one for each of these but sorted_l1, which comes with uld, and one for each aligner.
ENTRY_POINTS = {*BUILT_IN, "align_byte_span", "align_identity", "align_min_edit"} - {"sorted_l1"}

CLASS = SQUARED.partition("@kdflow.hookimpl")[0]


def found(name: str, loaded: plugins.Plugins | None = None) -> plugins.Plugin:
    """The plugin whose entry point is ``name``."""
    (match,) = [entry for entry in (loaded or plugins.load()).plugins if entry.name == name]
    return match


def names(loaded: plugins.Plugins) -> set[str]:
    """The algorithms that a run file can select."""
    return {entry.name for entry in loaded.of_kind("algorithm", "divergence")}


def loss_of(output: Path) -> float:
    (loss,) = [event["loss"] for event in read_events(output / "metrics.jsonl") if event["event"] == "step"]
    return float(loss)


# --- what third parties bring ----------------------------------------------------------------------------------------


def test_a_third_partys_divergence_is_a_complete_algorithm(
    command: Command, site: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    losses = {}
    for factor in (1.0, 2.0):
        output = tmp_path / f"factor-{factor}"
        run = write_run(algorithm={"name": "squared", "factor": factor}, training={"steps": 1}, output=str(output))
        assert command("train", run).code == 0
        losses[factor] = loss_of(output)
    assert 0 < losses[1.0] < 2
    assert losses[2.0] == pytest.approx(2 * losses[1.0], rel=1e-12)


def test_its_options_are_checked_like_those_of_any_other(command: Command, site: Path, write_run: WriteRun) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    result = command("train", write_run(algorithm={"name": "squared", "facto": 2.0}))
    assert result.code == 2
    assert "algorithm.facto: unknown key; did you mean 'factor'?" in result.err
    result = command("train", write_run(algorithm={"name": "squared", "factor": "much"}))
    assert "algorithm.factor: input should be a valid number" in result.err


def test_its_instance_has_the_options_that_every_divergence_has(site: Path) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    student, teacher = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    expected = 3.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).square().sum(-1)
    assert torch.equal(kdflow.get_divergence("squared", factor=3.0, temperature=2.0)(student, teacher), expected)
    scaled = kdflow.get_divergence("squared", factor=3.0, temperature=2.0, scale_by_temperature_squared=True)
    assert torch.equal(scaled(student, teacher), 4 * expected)
    options = kdflow.get_algorithm("squared").Options
    assert set(options.model_fields) == {"factor", "temperature", "scale_by_temperature_squared", "ce_weight"}


def test_a_pip_installed_algorithm_trains_a_module(tiny: dict[str, str], write_run: WriteRun, tmp_path: Path) -> None:
    """The module's weights move at every step and are in the checkpoints; format and tracker are the plugin's too."""
    site = tmp_path / "site"
    wheel = plugin("kdflow_mimic", MIMIC, version="2.5").wheel(tmp_path)
    done = python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    assert done.code == 0, done.err
    texts = [json.loads(line)["text"] for line in Path(tiny["train"]).read_text("utf-8").splitlines()]
    data = write_jsonl(tmp_path / "lines.jsonl", [{"line": text} for text in texts])
    run = write_run(
        algorithm={"name": "mimic", "weight": 0.5},
        data={"train": [{"path": data, "format": "line"}]},
        training={"steps": 3, "checkpoint_every": 1},
        tracking=["jsonl", "losses"],
    )
    result = kdflow_process("train", run, path=[site])
    assert result.code == 0, result.err
    output = tmp_path / "run"

    torch.manual_seed(0)
    weights = [torch.nn.Linear(32, 48).weight.detach()]
    for step in (1, 2, 3):
        moments = torch.zeros(48, 32)
        weights.append(torch.zeros(48, 32))
        checkpoint = output / "checkpoints" / f"step-{step:08d}"
        tensors = {"student.algorithm.weight": weights[-1], "optimizer.algorithm.weight.exp_avg": moments}
        load_tensors(checkpoint, tensors)
        assert moments.abs().max() > 0
    changes = [(after - before).abs().max().item() for before, after in pairwise(weights)]
    assert all(0 < change < 0.1 for change in changes), changes  # from where build() left it
    steps = [event for event in read_events(output / "metrics.jsonl") if event["event"] == "step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [event["distance"] for event in steps] == pytest.approx([event["loss"] for event in steps])
    tracked = [float(line) for line in (output / "losses.txt").read_text().splitlines()]
    assert tracked == [event["loss"] for event in steps]

    mine = {"name": "mimic", "distribution": "kdflow-mimic", "version": "2.5", "status": "loaded", "error": None}
    assert mine in json.loads((output / "environment.json").read_text())["plugins"]
    state = json.loads((output / "checkpoints" / "step-00000003" / "run_state.json").read_text())
    assert state["plugins"]["mimic"] == "kdflow-mimic 2.5"


NARROWED = """
import kdflow
from kdflow.contracts import LossSum

class Maybe(kdflow.Algorithm):
    name = "maybe"
    class Options(kdflow.Options):
        alone: bool = False
    def __init__(self, options=None):
        super().__init__(options)
        if self.options.alone:
            self.needs = frozenset()
    def loss(self, student, teacher, batch):
        return LossSum(student.rows.square().sum())

@kdflow.hookimpl
def kdflow_algorithms():
    return [Maybe]
"""


def test_an_algorithms_options_may_narrow_what_it_needs(site: Path, write_run: WriteRun) -> None:
    plugin("kdflow_maybe", NARROWED).install(site)
    run = write_run(algorithm={"name": "maybe"}, teacher=None, training={"steps": 1})
    with pytest.raises(KdflowError, match=r"algorithm 'maybe' needs a teacher: add teacher\.model"):
        kdflow.train(run)
    assert kdflow.train(run, ["algorithm.alone=true"]).steps == 1


def test_one_module_may_implement_several_hooks(site: Path) -> None:
    plugin("kdflow_mimic", MIMIC).install(site)
    assert set(found("mimic").provides) == {"algorithm mimic", "data format line", "tracker losses"}


def test_an_entry_point_may_name_an_object(site: Path) -> None:
    holder = "class Plugin:\n    @kdflow.hookimpl\n    def kdflow_divergences(self):\n        return [Squared]\n"
    source = f"{CLASS}\n{holder}\nplugin = Plugin()\n"
    Distribution("kdflow-squared", {"kdflow_squared": source}, {"squared": "kdflow_squared:plugin"}).install(site)
    assert found("squared").provides == ("divergence squared",)


# --- without kdflow's own entry points -------------------------------------------------------------------------------


def test_kdflow_without_its_own_entry_points_trains_with_a_third_partys(write_run: WriteRun, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    strip_kdflow(site)
    result = kdflow_process("algorithms", "list", "--json", path=[site])
    assert (result.code, json.loads(result.out)) == (0, [])
    plugin("kdflow_squared", SQUARED).install(site)
    result = kdflow_process("train", write_run(algorithm={"name": "squared"}, training={"steps": 2}), path=[site])
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["evaluation"]["after"]["divergence"] < summary["evaluation"]["before"]["divergence"]
    listed = json.loads((tmp_path / "run" / "environment.json").read_text())["plugins"]
    assert [entry["name"] for entry in listed] == ["squared"]


def test_the_built_in_algorithms_are_there_through_entry_points_alone(command: Command, site: Path) -> None:
    assert {entry.name: entry.kind for entry in plugins.load().of_kind("algorithm", "divergence")} == BUILT_IN
    strip_kdflow(site)
    loaded = plugins.load()
    assert loaded.plugins == []
    assert names(loaded) == set()
    assert command("algorithms", "list").out.startswith("no algorithms are installed")
    assert command("plugins", "list").out.startswith("no plugins are installed")
    with pytest.raises(KdflowError, match=r"'forward_kl' is not registered\. Installed: none\. If it comes from"):
        loaded.algorithm("forward_kl")
    # The rooms without which there is no run are no plugins that could be missing.
    assert {entry.name for entry in loaded.of_kind("data format")} == {"chat", "prompt_response", "text"}
    assert [entry.name for entry in loaded.of_kind("teacher engine")] == ["cache", "sglang", "transformers"]


# --- broken plugins --------------------------------------------------------------------------------------------------


def hook(body: str, name: str = "kdflow_divergences") -> str:
    return f"{CLASS}\n@kdflow.hookimpl\ndef {name}():\n    {body}\n"


def factor(default: str) -> str:
    """The option ``factor`` with another default."""
    return f"import pydantic\nfrom pydantic import Field\n{SQUARED.replace('= 1.0', f'= {default}')}"


EVALUATOR = """
import kdflow

class Asks(kdflow.Evaluator):
    name = "asks"
    class Options(kdflow.Options):
        shots: int = 0
    def evaluate(self, records, model):
        return {}

@kdflow.hookimpl
def kdflow_evaluators():
    return [Asks]
"""

BROKEN = {
    "import": ("import a_module_that_is_not_there", ["ModuleNotFoundError", "a_module_that_is_not_there"]),
    "syntax": ("def broken(:", ["SyntaxError"]),
    "raises": ("raise RuntimeError('needs a licence')", ["RuntimeError: needs a licence"]),
    "exits": ("raise SystemExit('no licence')", ["SystemExit: no licence"]),
    "no hook": (CLASS, ["implements no hook", "kdflow_divergences"]),
    "misspelt hook": (hook("return [Squared]", "kdflow_divergence"),
                      ["'kdflow_divergence' is not a hook of kdflow", "did you mean 'kdflow_divergences'?"]),
    "no such hook": (hook("return [Squared]", "on_start"), ["'on_start' is not a hook of kdflow", "kdflow_trackers"]),
    "unmarked hook": (f"{CLASS}\ndef kdflow_divergences():\n    return [Squared]\n",
                      ["kdflow_divergences is not marked as a hook", "@kdflow.hookimpl"]),
    "arguments": (hook("return [Squared]").replace("kdflow_divergences()", "kdflow_divergences(config)"),
                  ["kdflow_divergences takes no arguments", "(config)"]),
    "hook raises": (hook("return [Squared][1]"), ["IndexError"]),
    "hook exits": (hook("raise SystemExit('no licence')"), ["SystemExit: no licence"]),
    "returns None": (hook("pass"), ["kdflow_divergences must return a list of classes", "None"]),
    "returns a class": (hook("return Squared"), ["must return a list of classes", "Squared"]),
    "returns an instance": (hook("return [Squared()]"), ["must return subclasses of kdflow.Divergence", "Squared"]),
    "returns a name": (hook("return ['Squared']"), ["must return subclasses of kdflow.Divergence", "'Squared'"]),
    "other base": (hook("return [int]"), ["must return subclasses of kdflow.Divergence", "int"]),
    "other hook": (hook("return [Squared]", "kdflow_aligners"),
                   ["must return subclasses of kdflow.Aligner", "Squared"]),
    "nameless": (hook("return [Squared]").replace('name = "squared"', ""), ["Squared.name", "None"]),
    "bad name": (hook("return [Squared]").replace('"squared"', '"Squared KL"'),
                 ["Squared.name", "lower-case", "Squared KL"]),
    "abstract": (hook("return [Squared]").replace("per_token", "per_tokens"), ["Squared lacks per_token"]),
    "options": (hook("return [Squared]").replace("(kdflow.Options)", ""), ["Squared.Options", "kdflow.Options"]),
    "needs": (MIMIC.replace('"same_vocabulary"', '"same_vocab"'), ["Mimic.needs same_vocab", "same_vocabulary"]),
    **{
        f"option {option}": (hook("return [Squared]").replace("factor:", f"{option}:"),
                             ["Squared.Options may not define", option])
        for option in ("temperature", "scale_by_temperature_squared", "ce_weight", "name")
    },
    "option name of an algorithm": (MIMIC.replace("weight: float = 1.0", "name: str = ''"),
                                    ["Mimic.Options may not define name"]),
    **{
        f"option {option} of a data format": (
            MIMIC.replace('"line"', f'"line"\n    class Options(kdflow.Options):\n        {option}: str = ""', 1),
            [f"Line.Options may not define {option}: every data format has that"],
        )
        for option in SourceConfig.model_fields
    },
    **{
        f"option {option} of an evaluator": (EVALUATOR.replace("shots", option),
                                             [f"Asks.Options may not define {option}: every evaluator has that"])
        for option in EvaluatorChoice.model_fields
    },
    "needs a text": (MIMIC.replace('frozenset({"teacher", "same_vocabulary"})', '"teacher"'),
                     ["Mimic.needs must be a set of words, such as frozenset({'teacher'})"]),
    "default": (factor("Field(-1.0, ge=0)"), ["Squared.Options does not take its own default of factor: input should",
                                              "greater than or equal to 0, not -1.0"]),
    "default of another type": (factor("None"), ["own default of factor: input should be a valid number, not None"]),
    "default that is no JSON": (
        factor("torch.float32").replace("factor: float", "factor: object").replace("import", "import torch, ", 1),
        ["Squared.Options has a default of factor that cannot be written to a run's own file, torch.float32"],
    ),
    "default that JSON does not give back": (
        factor("Inner(size=2)").replace("factor: float", "factor: kdflow.Options").replace(
            "class Squared", "class Inner(kdflow.Options):\n    size: int = 1\n\nclass Squared"),
        ["Squared.Options reads its default of factor, Inner(size=2), back from a run's own file as Options()"],
    ),
    "secret": (factor("None").replace("factor: float", "factor: pydantic.SecretStr | None"),
               ["Squared.Options has secrets, factor, which would be written as asterisks", "from the environment"]),
    "alias": (factor("Field(0.5, alias='lambda')"), ["Squared.Options gives factor an alias"]),
    "computed": (factor("1.0\n        @pydantic.computed_field\n        def twice(self) -> float: return 2.0"),
                 ["Squared.Options computes twice"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_and_harms_nobody(site: Path, fault: str) -> None:
    source, fragments = BROKEN[fault]
    plugin("kdflow_broken", source).install(site)
    plugin("kdflow_good", divergence("good")).install(site)
    loaded = plugins.load()
    broken = found("broken", loaded)
    assert broken.status == "failed"
    assert broken.provides == ()
    assert broken.error is not None
    for fragment in fragments:
        assert fragment in broken.error
    assert names(loaded) == {*BUILT_IN, "good"}
    assert [entry.name for entry in loaded.plugins if entry.status != "loaded"] == ["broken"]


def test_a_broken_plugin_may_be_called_core(site: Path) -> None:
    """As kdflow's own rooms are, whose faults are no plugin's."""
    plugin("kdflow_core", hook("return [Squared][1]")).install(site)
    loaded = plugins.load()
    assert found("core", loaded).status == "failed"
    assert names(loaded) == set(BUILT_IN)


def test_options_without_a_default_are_no_fault(site: Path) -> None:
    """Nor those of which one is to be given."""
    either = (
        "None\n        other: float\n        third: int = Field(default_factory=int)\n"
        "        @pydantic.model_validator(mode='after')\n        def _either(self):\n"
        "            raise ValueError('give one')"
    )
    plugin("kdflow_squared", factor(either).replace("factor: float", "factor: float | None")).install(site)
    assert found("squared").status == "loaded"


def test_options_may_ask_for_other_plugins(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while plugins are loaded, for one of kdflow's that is not there yet, or that is blocked."""
    load, loads = plugins.load, list[Any]()

    def counted(*block: Any) -> plugins.Plugins:
        loads.append(block)
        return load(*block)

    monkeypatch.setattr(plugins, "load", counted)
    asks = (
        "1.0\n        model_config = pydantic.ConfigDict(validate_default=True)\n"
        "        @pydantic.field_validator('factor', mode='after')\n        @classmethod\n"
        "        def _asks(cls, value):\n            kdflow.get_divergence('tvd')\n            return value"
    )
    plugin("kdflow_squared", factor(asks)).install(site)
    for block in ([], ["tvd"]):
        assert found("squared", plugins.load(block)).status == "loaded"
    assert loads == [([],), (["tvd"],)]


@pytest.mark.parametrize(("value", "fragment"), [
    ("kdflow_broken:absent", "absent"), ("kdflow_absent", "kdflow_absent"), ("no module at all", ""),
])  # fmt: skip
def test_an_entry_point_that_leads_nowhere(site: Path, value: str, fragment: str) -> None:
    Distribution("kdflow-broken", {"kdflow_broken": SQUARED}, {"broken": value}).install(site)
    loaded = plugins.load()
    broken = found("broken", loaded)
    assert (broken.status, broken.provides) == ("failed", ())
    assert broken.error is not None
    assert fragment in broken.error
    assert names(loaded) == set(BUILT_IN)


def test_what_one_hook_of_a_plugin_brings_is_not_kept_when_another_fails(site: Path) -> None:
    plugin("kdflow_half", MIMIC.replace("return [Losses]", "return [None]")).install(site)
    loaded = plugins.load()
    assert found("half", loaded).status == "failed"
    assert names(loaded) == set(BUILT_IN)
    assert [entry.name for entry in loaded.of_kind("data format")] == ["chat", "prompt_response", "text"]


def test_a_broken_plugin_is_seen_where_it_matters(command: Command, site: Path, write_run: WriteRun) -> None:
    plugin("kdflow_broken", "import a_module_that_is_not_there", version="3.1").install(site)
    result = command("plugins", "list")
    assert result.code == 0
    line = next(line for line in result.out.splitlines() if "broken" in line)
    assert "kdflow-broken 3.1" in line
    assert "failed" in line
    assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in line

    (entry,) = [entry for entry in json.loads(command("plugins", "list", "--json").out) if entry["name"] == "broken"]
    assert entry == {
        "name": "broken", "module": "kdflow_broken", "distribution": "kdflow-broken", "version": "3.1",
        "status": "failed", "provides": [],
        "error": "ModuleNotFoundError: No module named 'a_module_that_is_not_there' (kdflow_broken.py:1)",
    }  # fmt: skip
    shown = command("plugins", "show", "broken").out
    assert "failed" in shown
    assert "a_module_that_is_not_there" in shown

    result = command("train", write_run(algorithm={"name": "broken_kl"}))
    assert result.code == 2
    assert "algorithm 'broken_kl' is not registered" in result.err
    assert "plugin 'broken' of distribution 'kdflow-broken 3.1' failed to load" in result.err
    assert "No module named 'a_module_that_is_not_there'" in result.err


def test_a_broken_plugin_in_a_process_of_its_own(tmp_path: Path) -> None:
    plugin("kdflow_broken", "raise SystemExit(7)").install(tmp_path)
    plugin("kdflow_squared", SQUARED).install(tmp_path)
    result = kdflow_process("plugins", "list", path=[tmp_path])
    assert (result.code, result.err) == (0, "")
    rows = {name: line for line in result.out.splitlines() for name in ("broken", "squared") if f"│ {name} " in line}
    assert "failed" in rows["broken"]
    assert "SystemExit: 7" in rows["broken"]
    assert "divergence squared" in rows["squared"]


# --- clashes ---------------------------------------------------------------------------------------------------------


def two_with_one_entry_point(site: Path) -> None:
    plugin("kdflow_one", divergence("one"), entry_point="shared", version="1.1").install(site)
    plugin("kdflow_two", divergence("two"), entry_point="shared", version="2.2").install(site)


def two_with_one_class(site: Path, second: str = divergence("twin")) -> None:
    plugin("kdflow_one", divergence("twin"), version="1.1").install(site)
    plugin("kdflow_two", second, version="2.2").install(site)


def test_two_distributions_with_one_entry_point_name_are_refused(command: Command, site: Path) -> None:
    two_with_one_entry_point(site)
    result = command("algorithms", "list")
    assert result.code == 2
    assert "two distributions register a plugin called 'shared'" in result.err
    assert "kdflow-one 1.1" in result.err
    assert "kdflow-two 2.2" in result.err
    assert "-p no:kdflow-two" in result.err


def test_also_when_neither_can_be_imported(site: Path) -> None:
    plugin("kdflow_one", "import a_module_that_is_not_there", entry_point="shared").install(site)
    plugin("kdflow_two", "import a_module_that_is_not_there", entry_point="shared").install(site)
    with pytest.raises(KdflowError, match=r"(?s)'shared'.*kdflow-one 1\.0.*kdflow-two 1\.0"):
        plugins.load()


AS_AN_ALGORITHM = MIMIC.replace('"mimic"', '"twin"')


@pytest.mark.parametrize("second", [divergence("twin"), AS_AN_ALGORITHM], ids=["divergence", "algorithm"])
def test_two_classes_with_one_algorithm_name_are_refused(command: Command, site: Path, second: str) -> None:
    two_with_one_class(site, second)
    result = command("algorithms", "list", "--json")
    assert result.code == 2
    assert "'twin'" in result.err
    for origin in ("kdflow_one.Third (plugin 'one' of distribution 'kdflow-one 1.1')", "distribution 'kdflow-two 2.2'"):
        assert origin in result.err
    assert "-p no:two" in result.err


def test_an_algorithm_and_then_a_divergence_of_its_name_are_refused(site: Path) -> None:
    plugin("kdflow_one", AS_AN_ALGORITHM).install(site)
    plugin("kdflow_two", divergence("twin")).install(site)
    with pytest.raises(KdflowError, match=r"(?s)'twin'.*kdflow-one 1\.0.*kdflow-two 1\.0"):
        plugins.load()


def test_a_class_with_the_name_of_a_built_in_one_is_refused(site: Path) -> None:
    plugin("kdflow_mine", divergence("jsd")).install(site)
    with pytest.raises(KdflowError, match=r"divergence 'jsd'.*distribution 'kdflow .*distribution 'kdflow-mine 1\.0'"):
        plugins.load()
    loaded = plugins.load(["jsd"])
    assert loaded.find("jsd", "divergence").plugin.distribution == "kdflow-mine"


def test_a_class_with_the_name_of_one_that_cannot_be_blocked_is_refused(site: Path) -> None:
    plugin("kdflow_mimic", MIMIC.replace('"line"', '"text"', 1)).install(site)
    with pytest.raises(KdflowError, match=r"data format 'text'.*distribution 'kdflow .*distribution 'kdflow-mimic "):
        plugins.load()


def test_the_same_name_for_different_kinds_is_no_clash(site: Path) -> None:
    plugin("kdflow_mimic", MIMIC.replace('"line"', '"mimic"', 1).replace('"losses"', '"jsd"')).install(site)
    assert found("mimic").status == "loaded"


def test_one_class_twice_from_one_plugin_is_refused(site: Path) -> None:
    plugin("kdflow_squared", SQUARED.replace("[Squared]", "[Squared, Squared]")).install(site)
    with pytest.raises(KdflowError, match="two plugins register the divergence 'squared'"):
        plugins.load()


@pytest.mark.parametrize(("clash", "block", "left"), [
    (two_with_one_entry_point, "kdflow-one", "two"),
    (two_with_one_entry_point, "kdflow-two", "one"),
    (two_with_one_class, "one", "twin"),
    (two_with_one_class, "kdflow-two", "twin"),
])  # fmt: skip
def test_blocking_resolves_a_clash(
    command: Command, site: Path, clash: Callable[[Path], None], block: str, left: str
) -> None:
    clash(site)
    assert command("algorithms", "list").code == 2
    result = command("-p", f"no:{block}", "algorithms", "list", "--json")
    assert result.code == 0
    listed = {entry["name"]: entry["distribution"] for entry in json.loads(result.out)}
    assert listed.keys() == {*BUILT_IN, left}
    assert listed[left] != block
    assert listed[left] in ("kdflow-one", "kdflow-two")


# --- blocking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squared", "kdflow-squared", "kdflow_squared", "KDFlow.Squared"])
@pytest.mark.parametrize("form", ["before", "before, joined", "between", "after", "after, joined"])
def test_a_plugin_is_blocked_by_entry_point_or_distribution(command: Command, site: Path, form: str, name: str) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    option = [f"-pno:{name}"] if "joined" in form else ["-p", f"no:{name}"]
    arguments = {
        "before": [*option, "plugins", "list", "--json"],
        "between": ["plugins", *option, "list", "--json"],
        "after": ["plugins", "list", "--json", *option],
    }[form.split(",")[0]]
    status = {entry["name"]: entry["status"] for entry in json.loads(command(*arguments).out)}
    assert status == {**dict.fromkeys(ENTRY_POINTS, "loaded"), "squared": "blocked"}
    assert "kdflow_squared" not in sys.modules  # blocked means: not even imported


def test_several_plugins_are_blocked_before_and_after(command: Command, site: Path) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    result = command("-p", "no:jsd", "algorithms", "list", "--json", "-p", "no:squared", "-pno:sft")
    assert {entry["name"] for entry in json.loads(result.out)} == set(BUILT_IN) - {"jsd", "sft"}


@pytest.mark.parametrize("name", ["squared", "kdflow-squared"])
@pytest.mark.parametrize("how", ["option after", "option before", "run file", "override", "function", "one text"])
def test_a_blocked_plugin_does_not_train(
    command: Command, site: Path, write_run: WriteRun, tmp_path: Path, how: str, name: str
) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    run = write_run(algorithm={"name": "squared"}, plugins={"block": [name] if how == "run file" else []})
    if how in ("function", "one text"):
        with pytest.raises(KdflowError) as caught:
            kdflow.train(run, block=[name] if how == "function" else name)
        message = str(caught.value)
    else:
        before = ["-p", f"no:{name}"] if how == "option before" else []
        after = {"option after": ["-p", f"no:{name}"], "override": [f"plugins.block=[{name}]"]}.get(how, [])
        result = command(*before, "train", run, *after)
        assert result.code == 2
        message = result.err
    assert "algorithm 'squared' is not registered" in message
    assert "plugin 'squared' of distribution 'kdflow-squared 1.0' is blocked" in message
    assert not (tmp_path / "run").exists()


def test_a_blocked_divergence_is_not_found_by_an_algorithm(command: Command, write_run: WriteRun) -> None:
    run = write_run(algorithm={"name": "gkd", "divergence": "tvd"})
    result = command("-p", "no:tvd", "train", run)
    assert result.code == 2
    assert "algorithm: divergence 'tvd' is not registered" in result.err
    assert "plugin 'tvd' of distribution 'kdflow" in result.err


def test_blocking_kdflow_itself_leaves_what_a_run_cannot_do_without(site: Path) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    loaded = plugins.load(["kdflow"])
    assert names(loaded) == {"squared"}
    assert {entry.status for entry in loaded.plugins if entry.distribution == "kdflow"} == {"blocked"}
    assert [entry.name for entry in loaded.of_kind("teacher engine")] == ["cache", "sglang", "transformers"]
    assert {entry.name for entry in loaded.of_kind("tracker")} == {"console", "jsonl"}


@pytest.mark.parametrize("arguments", ["-p squared plugins list", "plugins list -p no:", "plugins list -p"])
def test_a_misused_option_is_refused(command: Command, arguments: str) -> None:
    result = command(*arguments.split())
    assert result.code == 2
    assert "-p" in result.err


def test_after_a_double_dash_it_is_an_argument(command: Command) -> None:
    assert "plugin '-p' is not installed" in command("plugins", "show", "--", "-p").err


# --- names, and what is shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "meant"), [
    ("forward_kll", "forward_kl"), ("forwardkl", "forward_kl"), ("Forward-KL", "forward_kl"), ("JSD", "jsd"),
    ("skew_reverse", "skew_reverse_kl"), ("squard", "squared"), ("SFT", "sft"),
])  # fmt: skip
def test_did_you_mean(site: Path, given: str, meant: str) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    with pytest.raises(KdflowError) as caught:
        plugins.load().algorithm(given)
    assert f"algorithm '{given}' is not registered; did you mean '{meant}'?" in str(caught.value)
    assert "adaptive_kl, dskd, forward_kl, gkd, jsd" in str(caught.value)  # what there is, too


@pytest.mark.parametrize(("kind", "section", "given", "meant"), [
    ("teacher engine", {"teacher": {"engine": {"name": "transformer"}}}, "transformer", "transformers"),
    ("tracker", {"tracking": ["json_l"]}, "json_l", "jsonl"),
    ("data format", {"data": {"train": [{"path": "x", "format": "txt"}]}}, "txt", "text"),
])  # fmt: skip
def test_did_you_mean_for_other_kinds(
    command: Command, write_run: WriteRun, kind: str, section: dict[str, Any], given: str, meant: str
) -> None:
    result = command("train", write_run(**section))
    assert result.code == 2
    assert f"{kind} '{given}' is not registered; did you mean '{meant}'?" in result.err


def test_algorithms_as_json(command: Command, site: Path) -> None:
    plugin("kdflow_squared", SQUARED, version="4.0").install(site)
    plugin("kdflow_mimic", MIMIC).install(site)
    listed = {entry["name"]: entry for entry in json.loads(command("algorithms", "list", "--json").out)}
    kinds = {name: entry["kind"] for name, entry in listed.items()}
    assert kinds == {**BUILT_IN, "squared": "divergence", "mimic": "algorithm"}
    assert listed["squared"] == {
        "name": "squared", "kind": "divergence", "needs": ["same_vocabulary", "teacher"], "paper": None,
        "distribution": "kdflow-squared", "version": "4.0",
    }  # fmt: skip
    assert listed["mimic"]["paper"] == "https://example.org/mimic"
    assert listed["sft"]["needs"] == []
    assert listed["jsd"]["distribution"] == "kdflow"
    assert all(entry["paper"].startswith("https://arxiv.org/abs/") for name, entry in listed.items()
               if name in BUILT_IN and entry["kind"] == "divergence")  # fmt: skip


def test_algorithms_as_tables(command: Command, site: Path) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    listed = command("algorithms", "list").out
    for name in (*BUILT_IN, "squared", "kdflow-squared", "https://arxiv.org/abs/2306.13649"):
        assert name in listed
    shown = command("algorithms", "show", "squared").out
    for fragment in ("Squared difference of probabilities.", "kdflow-squared", "factor", "1.0", "temperature", "≥ 1e-"):
        assert fragment in shown
    shown = json.loads(command("algorithms", "show", "squared", "--json").out)
    assert shown["description"] == "Squared difference of probabilities."
    assert shown["options"]["factor"]["default"] == 1.0


def test_plugins_are_shown_with_what_they_provide(command: Command, site: Path) -> None:
    plugin("kdflow_mimic", MIMIC).install(site)
    shown = json.loads(command("plugins", "show", "mimic", "--json").out)
    assert shown["module"] == "kdflow_mimic"
    assert shown["provides"] == ["algorithm mimic", "data format line", "tracker losses"]
    assert "algorithm mimic" in command("plugins", "show", "mimic").out
    result = command("plugins", "show", "mimik")
    assert result.code == 2
    assert "plugin 'mimik' is not installed; did you mean 'mimic'?" in result.err


def test_the_versions_name_every_distribution_and_load_none(command: Command, site: Path) -> None:
    two_with_one_entry_point(site)
    result = command("--version")
    assert result.code == 0
    assert result.out.splitlines() == [f"kdflow {kdflow.__version__}", "plugin kdflow-one 1.1", "plugin kdflow-two 2.2"]


# --- a factory, and no torch -----------------------------------------------------------------------------------------


def test_each_load_is_independent(site: Path) -> None:
    first = plugins.load()
    plugin("kdflow_squared", SQUARED).install(site)
    second, third = plugins.load(), plugins.load(["squared"])
    assert [("squared" in names(loaded)) for loaded in (first, second, third)] == [False, True, False]
    second.plugins.clear()
    found("jsd", third).status = "failed"
    assert found("jsd", first).status == "loaded"
    assert found("jsd").status == "loaded"
    everything = {id(entry) for entry in plugins.load().plugins}
    assert everything.isdisjoint(id(entry) for entry in first.plugins)


def test_no_module_of_kdflow_holds_a_manager() -> None:
    plugins.load()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "kdflow":
            values = vars(module).items()
            held = [key for key, value in values if isinstance(value, pluggy.PluginManager | plugins.Plugins)]
            assert held == [], f"{name} holds {held}"


def test_what_is_loaded_is_what_ranks_compare(site: Path) -> None:
    plugin("kdflow_squared", SQUARED, version="9.9").install(site)
    plugin("kdflow_broken", "import a_module_that_is_not_there").install(site)
    compared = plugins.plugin_set(plugins.load(["jsd"]))
    own = f"kdflow {kdflow.__version__}"
    assert compared == {**dict.fromkeys(ENTRY_POINTS - {"jsd"}, own), "squared": "kdflow-squared 9.9"}


def test_installed_plugins_are_known_without_importing_them(site: Path) -> None:
    plugin("kdflow_squared", SQUARED).install(site)
    assert {entry.name for entry in plugins.installed()} == {*ENTRY_POINTS, "squared"}
    assert "kdflow_squared" not in sys.modules


@pytest.mark.parametrize("statement", [
    "import kdflow",
    "import kdflow; dir(kdflow); kdflow.Divergence, kdflow.Options, kdflow.hookimpl, kdflow.Algorithm",
    "import kdflow.plugins, kdflow.hookspecs, kdflow.config, kdflow.contracts",
    "import kdflow.config; kdflow.config.RunConfig.model_fields",
    "import kdflow.cli; kdflow.cli.main(['--help'])",
    "import kdflow.cli; kdflow.cli.main(['train', '--help'])",
    "import kdflow.cli; kdflow.cli.main(['--version'])",
])  # fmt: skip
def test_torch_is_not_imported_before_it_is_needed(statement: str) -> None:
    program = f"import sys\ntry:\n    {statement}\nexcept SystemExit as done:\n    assert not done.code\n"
    heavy = "('torch', 'transformers', 'datasets', 'numpy')"
    result = python("-c", f"{program}print('HEAVY', [name for name in {heavy} if name in sys.modules])")
    assert result.code == 0, result.err
    assert "HEAVY []" in result.out.splitlines()


def test_it_would_be_seen_if_torch_were_imported() -> None:
    result = python("-c", "import sys, kdflow.runtime.optimizer; print('torch' in sys.modules)")
    assert result.out.strip() == "True"


def test_run_files_can_be_checked_where_torch_is_not_installed(tmp_path: Path, write_run: WriteRun) -> None:
    """The configuration is typed without torch: documentation, editors and schedulers can read run files."""
    run = write_run()
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"from kdflow import config; print(config.load({str(run)!r}).config.algorithm.name)"
    )
    result = python("-c", program)
    assert (result.code, result.out.strip()) == (0, "forward_kl"), result.err
    assert importlib.util.find_spec("torch") is not None
    assert config.load(run).config.algorithm.name == "forward_kl"


def test_blocking_what_is_not_installed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    plugins.load(["jsdd", "jsd"])
    assert [record.message for record in caplog.records] == [
        "nothing that is installed is called 'jsdd': there is nothing to block"
    ]
