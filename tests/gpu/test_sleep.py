"""Engines that leave the GPU while they sleep, and are as they were when they wake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdflow.contracts import Engine, EngineContext, Options, Rollout, Sampling
from kdflow.engines.sglang.rollout import SGLangRollout, SGLangRolloutOptions
from kdflow.engines.sglang.teacher import SGLangTeacher, SGLangTeacherOptions
from kdflow.engines.transformers.rollout import TransformersRollout, TransformersRolloutOptions
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.models.loading import load_model
from kdflow.runtime.turns import rest, wake
from tests.engines.test_rollout import make_prompts
from tests.engines.test_transformers import make_batch
from tests.support.models import make_model, make_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# Attention kernels that come with torch are there wherever sglang is.
SGLANG: dict[str, Any] = {"memory_fraction": 0.2, "attention_backend": "triton"}
GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One whose head is 64 wide, as the GPU's attention kernels take it."""
    root = tmp_path_factory.mktemp("sleep")
    return make_model(root / "model", hidden=512, layers=6, seed=1, tokenizer=make_tokenizer(), padding=16)


@pytest.fixture
def context(cuda: torch.device) -> EngineContext:
    return EngineContext(cuda, torch.bfloat16, max_tokens=512, sleeps=True)


def free() -> int:
    """Bytes of the GPU that nobody has, of whatever process."""
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def scored(engine: SGLangTeacher | TransformersTeacher, device: torch.device, seed: int) -> torch.Tensor:
    tokens = make_batch(seed).to(device).teacher
    assert tokens is not None
    lease = engine.score(tokens)
    rows = lease.rows.clone()
    lease.release()
    return rows


def sleep_and_wake(engine: Engine, model: str) -> None:
    """Half of the weights in bf16, a quarter of the file's in fp32, is what is given back at least."""
    before = free()
    rest(engine)
    assert free() - before >= Path(model, "model.safetensors").stat().st_size // 4
    wake(engine)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """As a share of the norm: SGLang may cut the same requests into other batches, which round otherwise."""
    return float((one - other).float().norm() / other.float().norm())


def test_a_teacher_in_the_students_process_gives_its_blocks_back(model: str, context: EngineContext) -> None:
    engine = TransformersTeacher(model, Options(), context)
    expected = scored(engine, context.device, 0)
    before = torch.cuda.memory_allocated()
    rest(engine)
    blocks = before - torch.cuda.memory_allocated()
    assert blocks > 0.8 * sum(weight.nbytes for weight in engine._model.parameters())
    assert engine.head.weight.is_cuda
    wake(engine)
    assert torch.equal(scored(engine, context.device, 0), expected)


def test_what_writes_in_the_students_process_gives_all_of_it_back(model: str, context: EngineContext) -> None:
    engine = TransformersRollout(model, TransformersRolloutOptions(), context)
    expected = engine.generate(make_prompts(), GREEDY)
    before = torch.cuda.memory_allocated()
    rest(engine)
    assert before - torch.cuda.memory_allocated() >= sum(weight.nbytes for weight in engine._model.parameters())
    wake(engine)
    assert engine.generate(make_prompts(), GREEDY) == expected


@pytest.mark.sglang
def test_sglangs_teacher_wakes_as_it_was_new_weights_included(model: str, context: EngineContext) -> None:
    """Its slots, which it opened before it slept, included."""
    engine = SGLangTeacher(model, SGLangTeacherOptions(**SGLANG), context)
    weights = dict(load_model(model, context.dtype, context.device).named_parameters())
    for times in (1, 2):
        expected = scored(engine, context.device, 0)
        for _ in range(2):
            sleep_and_wake(engine, model)
            assert apart(scored(engine, context.device, 0), expected) < 1e-2
        engine.update_weights((name, weight.roll(times, 0)) for name, weight in weights.items())
        assert apart(scored(engine, context.device, 0), expected) > 1e-1
    assert engine.restarts == 0
    engine.close()


@pytest.mark.sglang
def test_sglangs_rollouts_wake_as_they_were_new_weights_included(model: str, context: EngineContext) -> None:
    """Its CUDA graphs, which hold addresses of weights, included."""
    engine = SGLangRollout(model, SGLangRolloutOptions(**SGLANG, cache_tokens=4096), context)
    weights = dict(load_model(model, context.dtype, context.device).named_parameters())

    def written() -> Rollout:
        (one,) = engine.generate([list(range(5, 22))], GREEDY)
        return one

    for times in (1, 2):
        expected = written()
        for _ in range(2):
            sleep_and_wake(engine, model)
            again = written()
            assert again.ids == expected.ids
            assert again.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-2)
        engine.update_weights((name, weight.roll(times, 0)) for name, weight in weights.items())
        # Its ids would say little: a random model repeats one, whatever its weights.
        assert written().log_probabilities != pytest.approx(expected.log_probabilities, abs=1e-1)
    assert engine.restarts == 0
    engine.close()
