"""The page of hooks is documentation that runs: each example is a whole plugin, taken from its docstring as it is."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

import kdflow
from kdflow import hookspecs, plugins, testing
from kdflow.contracts import EngineContext, EvaluatedModel, Sample, Sampling, TokenBatch
from tests.support.commands import one_thread, site
from tests.support.distributions import plugin

__all__ = ["one_thread", "site"]

# What each example provides.
EXAMPLES = {
    "kdflow_divergences": "divergence squared",
    "kdflow_algorithms": "algorithm mimic",
    "kdflow_aligners": "aligner whole",
    "kdflow_teachers": "teacher engine noise",
    "kdflow_rollouts": "rollout engine echo",
    "kdflow_datasets": "data format question",
    "kdflow_trackers": "tracker losses",
    "kdflow_evaluators": "evaluator brevity",
}


def example(hook: str) -> str:
    """The source of the example in the docstring of ``hook``."""
    _, marker, source = inspect.getdoc(getattr(hookspecs, hook)).partition("\nExample:\n")
    assert marker, f"{hook} has no example"
    return dedent(source)


def provided(hook: str, site: Path) -> Any:
    """The class that the example of ``hook`` provides, once it is installed and loaded."""
    plugin(f"kdflow_example_{hook}", example(hook), entry_point="example").install(site)
    loaded = plugins.load()
    (found,) = [entry for entry in loaded.plugins if entry.name == "example"]
    assert (found.status, found.error) == ("loaded", None)
    assert found.provides == (EXAMPLES[hook],)
    kind, _, name = EXAMPLES[hook].rpartition(" ")
    return loaded.find(name, kind).cls


def tokens(count: int) -> TokenBatch:
    positions = torch.arange(count + 1)
    bounds = torch.tensor([0, count + 1], dtype=torch.int32)
    return TokenBatch(positions, positions, bounds, positions[:-1], torch.zeros(count).long(), count + 1, "digest")


def test_every_hook_is_on_the_page_and_every_hook_of_the_page_is_read() -> None:
    specified = [name for name in vars(hookspecs) if name.startswith("kdflow_")]
    marked = [name for name in specified if getattr(getattr(hookspecs, name), "kdflow_spec", None) is not None]
    assert specified == marked == list(plugins.KINDS) == list(EXAMPLES)


def test_the_page_is_a_page() -> None:
    source = Path(hookspecs.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 250
    # Declarations and their documentation alone: no logic hides among them.
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert len(functions) == len(plugins.KINDS)
    assert all(len(function.body) == 1 and ast.get_docstring(function) for function in functions)


@pytest.mark.parametrize("hook", EXAMPLES)
def test_the_example_is_a_plugin_that_loads(site: Path, hook: str) -> None:
    kind, base = plugins.KINDS[hook]
    cls = provided(hook, site)
    assert issubclass(cls, base)
    assert EXAMPLES[hook] == f"{kind} {cls.name}"


@pytest.mark.parametrize("hook", EXAMPLES)
def test_the_examples_are_short_and_need_nothing_but_kdflow_and_torch(hook: str) -> None:
    source = example(hook)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {name.name.partition(".")[0] for node in imports if isinstance(node, ast.Import) for name in node.names}
    roots |= {str(node.module).partition(".")[0] for node in imports if isinstance(node, ast.ImportFrom)}
    assert roots <= {"kdflow", "torch"}
    assert len(source.splitlines()) <= 30


def test_the_divergence(site: Path) -> None:
    provided("kdflow_divergences", site)
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    assert torch.equal(kdflow.get_divergence("squared")(student, teacher), torch.tensor([0.5, 0.0]))


def test_the_algorithm(site: Path) -> None:
    cls = provided("kdflow_algorithms", site)
    torch.manual_seed(0)
    student = {"hidden": torch.randn(5, 8, requires_grad=True), "head": torch.randn(11, 8)}
    teacher = {"hidden": torch.randn(5, 6), "head": torch.randn(11, 6)}
    module = torch.nn.Linear(8, 6)
    loss = testing.loss("mimic", {}, student, teacher, module=module).value
    expected = (module(student["hidden"]) - teacher["hidden"]).square().mean(-1).sum()
    assert torch.equal(loss, expected)
    built = cls().build(kdflow.contracts.ModelSpec(8, 11), kdflow.contracts.ModelSpec(6, 11))
    assert (built.in_features, built.out_features) == (8, 6)


def test_the_aligner(site: Path) -> None:
    provided("kdflow_aligners", site)
    alignment = kdflow.get_aligner("whole").align([b"a", b"b"], [b"ab"])
    assert alignment.spans == ((slice(0, 2), slice(0, 1)),)


def test_the_teacher_engine(site: Path) -> None:
    cls = provided("kdflow_teachers", site)
    engine = cls("anything", kdflow.Options(), EngineContext(torch.device("cpu"), torch.float32))
    lease = engine.score(tokens(4))
    assert (lease.rows.shape, lease.digest) == ((4, engine.spec.hidden_size), "digest")
    assert engine.head.logits(lease.rows).shape == (4, engine.spec.vocab_size)
    engine.sleep()
    engine.wake()
    lease.release()
    with pytest.raises(RuntimeError, match="noise has no weights"):
        engine.update_weights(iter(()))
    engine.close()


def test_the_rollout_engine(site: Path) -> None:
    cls = provided("kdflow_rollouts", site)
    engine = cls("anything", kdflow.Options(), EngineContext(torch.device("cpu"), torch.float32))
    prompts: Sequence[Sequence[int]] = [[1, 2, 3], [4]]
    rollouts = engine.generate(prompts, Sampling(max_new_tokens=2, n=2))
    assert [rollout.ids for rollout in rollouts] == [(1, 2), (1, 2), (4,), (4,)]
    assert all(len(rollout.ids) == len(rollout.log_probabilities) for rollout in rollouts)
    engine.close()


def test_the_data_format(site: Path) -> None:
    reader = provided("kdflow_datasets", site)()
    sample = reader.read({"question": "Why?", "answer": "Because."})
    assert (sample.prompt, sample.response) == ("Why?\n", "Because.")
    with pytest.raises(ValueError, match="'answer'"):
        reader.read({"question": "Why?"})


def test_the_tracker(site: Path, tmp_path: Path) -> None:
    tracker = provided("kdflow_trackers", site)()
    tracker.start(tmp_path, {}, 1)
    tracker.event({"event": "eval", "step": 0})
    tracker.event({"event": "step", "step": 1, "loss": 0.25})
    tracker.close()
    assert (tmp_path / "losses.txt").read_text() == "0.25\n"


def test_the_evaluator(site: Path) -> None:
    class Model(EvaluatedModel):
        def respond(self, prompts: Sequence[Sample], max_new_tokens: int) -> list[str]:
            return [prompt.prompt * 2 for prompt in prompts]

        def log_likelihoods(self, responses: Sequence[Sample]) -> list[float]:
            raise NotImplementedError

    evaluator = provided("kdflow_evaluators", site)()
    assert evaluator.evaluate([{"prompt": "ab"}, {"prompt": "c"}], Model()) == {"characters": (6.0, 2)}
