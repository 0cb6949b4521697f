"""The student's copy in the real SGLang: what it writes, with which weights, and after it was killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kdflow
from kdflow.config import Choice
from kdflow.contracts import EngineContext, KdflowError, Sampling
from kdflow.engines.sglang.rollout import SGLangRollout, SGLangRolloutOptions
from kdflow.engines.transformers.rollout import TransformersRollout, TransformersRolloutOptions
from kdflow.runtime.generate import generate
from tests.engines.test_rollout import expected_log_probabilities, make_prompts
from tests.runtime.test_rollouts import assert_same_twice, greedy_twice
from tests.runtime.test_rollouts import on_policy as on_policy
from tests.sglang.support import CPU, engines_below, gone, held_files, killed_until_it_fails, members, schedulers, until
from tests.support.models import texts, write_jsonl
from tests.support.runs import events, finish, start, train, trajectory

RunFile = Callable[..., dict[str, Any]]
OPTIONS = {"cache_tokens": 4096}
VOCABULARY = 384


def load(model: str, cache_tokens: int = OPTIONS["cache_tokens"]) -> SGLangRollout:
    return SGLangRollout(model, SGLangRolloutOptions(cache_tokens=cache_tokens), EngineContext(CPU, torch.float32))


def embedded(model: str) -> TransformersRollout:
    return TransformersRollout(model, TransformersRolloutOptions(), EngineContext(CPU, torch.float32))


@pytest.fixture(scope="module")
def engine(tiny: dict[str, str]) -> Iterator[SGLangRollout]:
    """Of a model whose head is padded."""
    engine = load(tiny["untied"])
    yield engine
    group, held = engine._engine._process.pid, held_files(engine._engine._process.pid)
    engine.close()
    assert gone(group, held)


def test_greedy_is_what_the_embedded_engine_writes(engine: SGLangRollout, tiny: dict[str, str]) -> None:
    greedy = Sampling(max_new_tokens=12, temperature=0, n=2)
    ours, theirs = (one.generate(make_prompts(), greedy) for one in (engine, embedded(tiny["untied"])))
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    assert [one.finish for one in ours] == [one.finish for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.6)])
def test_log_probabilities_are_those_of_the_model_at_the_temperature(
    engine: SGLangRollout, tiny: dict[str, str], temperature: float, top_p: float
) -> None:
    prompts = make_prompts()
    found = engine.generate(prompts, Sampling(max_new_tokens=10, temperature=temperature, top_p=top_p, n=3))
    assert len(found) == 3 * len(prompts)
    assert len({one.ids for one in found}) > len(prompts), "drawn each on its own"
    for number, one in enumerate(found):
        assert max(one.ids) < VOCABULARY, "a row of the head that is no token"
        expected = expected_log_probabilities(tiny["untied"], prompts[number // 3], one, temperature, VOCABULARY)
        assert one.log_probabilities == pytest.approx(expected.tolist(), abs=1e-3)


def test_ids_that_end_a_response_are_part_of_it(engine: SGLangRollout) -> None:
    (whole,) = engine.generate([[5, 6, 7]], Sampling(max_new_tokens=8, temperature=0))
    end = whole.ids[3]
    (cut,) = engine.generate([[5, 6, 7]], Sampling(max_new_tokens=8, temperature=0, stop_ids=(end,)))
    assert cut.ids == whole.ids[: whole.ids.index(end) + 1]
    assert (whole.finish, cut.finish) == ("length", "stop")


def test_prompts_that_are_too_long_are_refused(engine: SGLangRollout) -> None:
    with pytest.raises(KdflowError, match="refuses the request"):
        engine.generate([[5] * 600], Sampling(max_new_tokens=4))
    assert len(engine.generate([[5]], Sampling(max_new_tokens=2))) == 1


def test_a_response_ends_with_the_models_positions(engine: SGLangRollout) -> None:
    found = engine.generate([[5] * length for length in (500, 509, 511)], Sampling(max_new_tokens=8, temperature=0))
    assert [(len(one.ids), one.finish) for one in found] == [(8, "length"), (3, "length"), (1, "length")]


def assert_no_response_is_cut_to_a_cache_of_64(engine: SGLangRollout) -> None:
    """SGLang itself would write 52 tokens after ten, and take no prompt of 58."""
    for prompt, fits, beyond in ((10, 52, 53), (10, 52, 1000), (57, 5, 6)):
        (whole,) = engine.generate([[5] * prompt], Sampling(max_new_tokens=fits, temperature=0))
        assert (len(whole.ids), whole.finish) == (fits, "length")
        needed = prompt + min(beyond, 512 - prompt) + 2
        with pytest.raises(KdflowError, match=f"has a cache of 64 tokens, and {needed} are needed.*Raise .*cache_tok"):
            engine.generate([[5], [5] * prompt, [6]], Sampling(max_new_tokens=beyond, temperature=0))
    with pytest.raises(KdflowError, match="65 are needed: 58 of a prompt, 1 of its response and 6 that SGLang keeps"):
        engine.generate([[5] * 58], Sampling(max_new_tokens=1))


def test_new_weights_arrive_and_outlive_the_engine(tiny: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny["untied"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator) * parameter.std().nan_to_num(1.0))
    other = embedded(tiny["untied"])
    other.update_weights(iter(model.named_parameters()))
    greedy = Sampling(max_new_tokens=12, temperature=0)
    expected = [one.ids for one in other.generate(make_prompts(), greedy)]
    engine = load(tiny["untied"], cache_tokens=64)
    assert_no_response_is_cut_to_a_cache_of_64(engine)
    before = [one.ids for one in engine.generate(make_prompts(), greedy)]
    assert before != expected
    engine.update_weights(iter(model.named_parameters()))
    assert [one.ids for one in engine.generate(make_prompts(), greedy)] == expected
    for process in schedulers(engine._engine._process.pid):
        os.kill(process, signal.SIGKILL)
    assert [one.ids for one in engine.generate(make_prompts(), greedy)] == expected, "with the newest weights"
    (scheduler,) = schedulers(engine._engine._process.pid)
    os.kill(scheduler, signal.SIGSTOP)
    written: list[list[tuple[int, ...]]] = []
    asks = threading.Thread(target=lambda: written.append([o.ids for o in engine.generate(make_prompts(), greedy)]))
    asks.start()
    asks.join(1.0)
    assert asks.is_alive(), "the scheduler stands still while it is asked to write"
    os.kill(scheduler, signal.SIGKILL)
    asks.join()
    assert written == [expected], "what was asked is asked again"
    assert engine.restarts == 2
    assert_no_response_is_cut_to_a_cache_of_64(engine)
    engine.close()


@pytest.mark.parametrize(("rate", "same"), [(0.0, True), (1e-3, False)])
def test_greedy_responses_change_with_the_weights_and_only_with_them(
    on_policy: RunFile, tiny: dict[str, str], tmp_path: Path, rate: float, same: bool
) -> None:
    assert_same_twice(greedy_twice(on_policy, tiny, tmp_path, rate, engine={"name": "sglang", **OPTIONS}), same)


def test_generate_writes_with_it_what_the_embedded_engine_writes(
    run_file: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text[:40]} for text in texts()[:8]])
    run, written = run_file(teacher={"model": tiny["untied"]}), {}
    for name, options in (("transformers", {}), ("sglang", OPTIONS)):
        output = tmp_path / f"{name}.jsonl"
        progress = generate(
            run, Path(prompts), output, Sampling(max_new_tokens=12, temperature=0),
            engine=Choice(name=name, **options),
        )  # fmt: skip
        assert progress.responses == 8
        assert progress.kept > 4
        written[name] = output.read_text(encoding="utf-8")
    assert written["sglang"] == written["transformers"]


@pytest.mark.parametrize(("ranks", "engines"), [(1, 1), (2, 1), (2, 2)])
def test_a_run_whose_engine_is_killed_writes_the_same_greedy_responses(
    on_policy: RunFile, tiny: dict[str, str], tmp_path: Path, ranks: int, engines: int
) -> None:
    """Two ranks share one engine of two processes, or have one each."""
    made = on_policy(
        student={"model": tiny["untied"]}, training={"steps": 8, "checkpoint_every": 1},
        rollout={"temperature": 0, "fraction": 0.5}, output=str(tmp_path / "embedded"),
    )  # fmt: skip
    train(made)
    engine = {"name": "sglang", "tensor_parallel": ranks // engines, **OPTIONS}
    run = {**made, "rollout": {**made["rollout"], "engine": engine}, "output": str(tmp_path / "killed")}
    process = start(run, "--nproc-per-node", str(ranks))
    until(lambda: len(events(tmp_path / "killed", "step")) >= 2 or process.poll() is not None, "the second step")
    groups = engines_below(process.pid)
    assert len(groups) == engines
    for scheduler in schedulers(groups[0]):
        os.kill(scheduler, signal.SIGKILL)
    finish(process)
    assert not any(members(group) for group in groups)
    keys = ("samples", "tokens", "target_tokens", "rollouts", "rollout_tokens")
    assert trajectory(tmp_path / "killed", keys) == trajectory(tmp_path / "embedded", keys)
    for key in ("loss", "grad_norm"):
        expected = [value for _, value in trajectory(tmp_path / "embedded", [key])]
        assert [value for _, value in trajectory(tmp_path / "killed", [key])] == pytest.approx(expected, rel=1e-4)
    assert max(event["rollout_gap"] for event in events(tmp_path / "killed", "step")) < 1e-4
    assert sum(event["engine_restarts"] for event in events(tmp_path / "killed", "step")) == 1


@pytest.mark.parametrize("student", [{"keep_layers": "::2"}, {"lora": {"rank": 4}}])
def test_cut_and_adapted_students_reach_the_engine(
    on_policy: RunFile, tiny: dict[str, str], student: dict[str, Any]
) -> None:
    made = on_policy(
        student={"model": tiny["untied"], **student}, rollout={"engine": {"name": "sglang", **OPTIONS}},
        training={"steps": 3, "learning_rate": 3e-2, "schedule": "constant", "warmup": 0},
    )  # fmt: skip
    kdflow.train(made)
    assert max(event["rollout_gap"] for event in events(made["output"], "step")) < 1e-4


def test_three_failures_in_a_row_of_the_engine_that_writes_end_the_run_with_a_checkpoint(
    on_policy: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    made = on_policy(
        student={"model": tiny["untied"]}, training={"steps": 1000}, output=str(tmp_path / "failing"),
        rollout={"temperature": 0, "engine": {"name": "sglang", **OPTIONS}},
    )  # fmt: skip
    process = start(made)
    until(lambda: len(events(made["output"], "step")) >= 2 or process.poll() is not None, "step 2")
    printed = killed_until_it_fails(process)
    assert "rollout.engine 'sglang' failed 3 times in a row" in printed
    assert f"Step {len(events(made['output'], 'step'))} is kept as a checkpoint: --resume auto goes on" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_launcher_of_two_ranks_that_is_ended_leaves_no_engine(
    number: signal.Signals, on_policy: RunFile, tiny: dict[str, str], tmp_path: Path
) -> None:
    shared = {"name": "sglang", "tensor_parallel": 2}
    made = on_policy(
        student={"model": tiny["untied"]}, teacher={"model": tiny["teacher"], "engine": shared},
        training={"steps": 100_000}, rollout={"engine": {**shared, **OPTIONS}}, output=str(tmp_path / "ended"),
    )  # fmt: skip
    before = set(Path("/dev/shm").iterdir())
    process = start(made, "--nproc-per-node", "2")
    until(lambda: bool(events(made["output"], "step")) or process.poll() is not None, "the first step")
    engines = {engine: held_files(engine) for engine in engines_below(process.pid)}
    assert len(engines) == 2, "one that scores and one that writes"
    os.kill(process.pid, number)
    process.communicate(timeout=120)
    until(lambda: all(gone(engine, held) for engine, held in engines.items()), "the end of the engines", 60)
    until(lambda: set(Path("/dev/shm").iterdir()) <= before, "the end of what they shared", 30)
