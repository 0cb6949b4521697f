"""Several GPUs: NCCL ranks, engines that ranks share, a teacher on a GPU of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.conftest import SGLANG
from tests.support.runs import events, losses, train, trajectory

pytestmark = [
    pytest.mark.gpu, pytest.mark.gpus, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
]  # fmt: skip
RunFile = Callable[..., dict[str, Any]]
TWO = ("--nproc-per-node", "2")


@pytest.fixture(scope="module")
def embedded(in_bf16: RunFile) -> Callable[[str], str]:
    """The output of one rank with its teacher in process, run once a dtype: on a GPU's machine a start takes long."""

    @functools.cache
    def output(dtype: str) -> str:
        run = in_bf16("embedded", training={"dtype": dtype})
        train(run)
        return str(run["output"])

    return output


@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_two_ranks_follow_one(in_bf16: RunFile, embedded: Callable[[str], str], dtype: str, rel: float) -> None:
    one = embedded(dtype)
    assert losses(one)[-1] < losses(one)[0]
    for name, training in {"sharded": {}, "replicas": {"replicas": 2}, "compiled": {"compile": True}}.items():
        two = in_bf16(name, training={"dtype": dtype, **training})
        train(two, *TWO)
        assert losses(two["output"]) == pytest.approx(losses(one), rel=rel), name
        assert trajectory(two["output"], ["samples"]) == trajectory(one, ["samples"])


@pytest.mark.sglang
@pytest.mark.parametrize("engine", [{"tensor_parallel": 2}, {"tensor_parallel": 1}], ids=["shared", "one each"])
def test_engines_of_sglang_beside_two_ranks(
    in_bf16: RunFile, embedded: Callable[[str], str], engine: dict[str, Any]
) -> None:
    run = in_bf16("sglang", {**SGLANG, **engine})
    printed = train(run, *TWO, "-v")
    assert "by cuda_ipc: 1 copies and 1024 bytes a row" in printed
    assert losses(run["output"]) == pytest.approx(losses(embedded("bfloat16")), rel=2e-2)


@pytest.mark.sglang
def test_a_teacher_on_a_gpu_of_its_own(in_bf16: RunFile, embedded: Callable[[str], str]) -> None:
    run = in_bf16("dedicated", {**SGLANG, "placement": "dedicated"})
    printed = train(run, "-v")
    assert "by cuda_ipc: 1 copies and 1024 bytes a row" in printed
    assert losses(run["output"]) == pytest.approx(losses(embedded("bfloat16")), rel=2e-2)


@pytest.mark.sglang
@pytest.mark.parametrize("engine", [{}, {"tensor_parallel": 2}], ids=["one each", "shared"])
def test_the_student_writes_on_two_gpus(on_policy: RunFile, engine: dict[str, Any]) -> None:
    run = on_policy("two", {}, training={"learning_rate": 3e-3})
    run["rollout"]["engine"] |= engine
    printed = train(run, *TWO, "-v")
    assert "weights go through the host" not in printed
    assert max(event["rollout_gap"] for event in events(run["output"], "step")) < 0.1
