"""SGLang on the student's GPU: rows and weights through CUDA memory, turns, a scheduler that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdflow.contracts import EngineContext, Lease, Options, Transport
from kdflow.engines.sglang import cuda_runtime
from kdflow.engines.sglang.teacher import SGLangTeacher, SGLangTeacherOptions
from kdflow.engines.transformers.teacher import TransformersTeacher
from tests.engines.test_transformers import make_batch
from tests.gpu.conftest import SGLANG
from tests.sglang.support import engines_below, gone, held_files, schedulers, until
from tests.support.runs import events, finish, losses, start, train

pytestmark = [
    pytest.mark.gpu, pytest.mark.sglang, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
]  # fmt: skip
RunFile = Callable[..., dict[str, Any]]
ALLOCATE = cuda_runtime.allocate


@pytest.mark.skipif(shutil.which("nvidia-cuda-mps-control") is None, reason="needs CUDA's multi-process service")
def test_kernels_of_two_processes_mix_under_cudas_service(cuda: torch.device, tmp_path: Path) -> None:
    """There, a teacher on the student's GPU works beside it instead of in turns."""
    assert not cuda_runtime.mixes_kernels(cuda)
    paths = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(tmp_path / "log")}
    for path in paths.values():
        Path(path).mkdir()
    code = "import torch; from kdflow.engines.sglang.cuda_runtime import mixes_kernels; "
    code += "torch.zeros(1, device='cuda'); print(mixes_kernels(torch.device('cuda', 0)))"
    environment = {**os.environ, **paths}
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True, timeout=60)
    try:
        told = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, timeout=120)
    finally:
        subprocess.run(["nvidia-cuda-mps-control"], input=b"quit", env=environment, check=True, timeout=60)
    assert told.stdout.split() == [b"True"]


def of_the_wrong_memory(size: int, device: torch.device) -> cuda_runtime.Allocation:
    """CUDA memory whose handle opens nothing, as where processes may not share it."""
    made = ALLOCATE(size, device)
    made.handle = bytes(len(made.handle))
    return made


@pytest.mark.parametrize(
    ("opens", "transport"),
    [
        (True, Transport("cuda_ipc", copies_per_row=1, bytes_per_row=512 * 2)),
        (False, Transport("shared_memory", copies_per_row=2, bytes_per_row=512 * 2)),
    ],
)
def test_rows_come_by_cuda_memory_or_through_the_host(
    models: dict[str, str], cuda: torch.device, monkeypatch: pytest.MonkeyPatch, opens: bool, transport: Transport
) -> None:
    if not opens:
        monkeypatch.setattr(cuda_runtime, "allocate", of_the_wrong_memory)
    options = SGLangTeacherOptions(**{key: value for key, value in SGLANG.items() if key != "name"})
    engine = SGLangTeacher(models["teacher"], options, EngineContext(cuda, torch.bfloat16, max_tokens=1024))
    embedded = TransformersTeacher(models["teacher"], Options(), EngineContext(cuda, torch.bfloat16))
    assert engine.transport == transport
    for seed in range(4):
        teacher = make_batch(seed).to(cuda).teacher
        assert teacher is not None
        leases: list[Lease] = [of.score(teacher) for of in (engine, embedded)]
        ours, theirs = (lease.rows.float() for lease in leases)
        assert ours.device == cuda
        assert (ours - theirs).norm() / theirs.norm() < 2e-2
        leases[0].release()
    group, held = engine._engine._process.pid, held_files(engine._engine._process.pid)
    engine.close()
    assert gone(group, held)


def test_a_killed_teacher_is_started_again_and_the_losses_are_those_of_the_embedded_one(in_bf16: RunFile) -> None:
    embedded, run = in_bf16("embedded"), in_bf16("sglang", SGLANG, training={"steps": 60})
    embedded["training"]["steps"] = 60
    train(embedded)
    process = start(run, "-v")
    until(lambda: len(events(run["output"], "step")) >= 3 or process.poll() is not None, "step 3")
    (group,) = engines_below(process.pid)
    held = held_files(group)
    os.kill(schedulers(group)[0], signal.SIGKILL)
    printed = finish(process)
    assert "by cuda_ipc: 1 copies and 1024 bytes a row" in printed
    assert "teacher.engine 'sglang' failed, 1 of at most 3 times" in printed
    assert gone(group, held)
    assert losses(run["output"]) == pytest.approx(losses(embedded["output"]), rel=2e-2)


def test_weights_go_through_cuda_memory_and_a_killed_engine_gets_the_newest(on_policy: RunFile) -> None:
    run = on_policy("killed", {"temperature": 1.0}, SGLANG, training={"steps": 30, "learning_rate": 3e-3})
    process = start(run, "-v")
    until(lambda: len(events(run["output"], "step")) >= 3 or process.poll() is not None, "step 3")
    for group in engines_below(process.pid):
        for scheduler in schedulers(group):
            os.kill(scheduler, signal.SIGKILL)
    printed = finish(process)
    assert "weights go through the host" not in printed
    assert "rollout.engine 'sglang' failed, 1 of at most 3 times" in printed
    # What stale weights would show is far more: the student changes at every step.
    assert max(event["rollout_gap"] for event in events(run["output"], "step")) < 0.1


def test_engines_that_sleep_change_nothing(on_policy: RunFile) -> None:
    greedy = {"temperature": 0.0}
    awake = on_policy("awake", greedy, SGLANG)
    asleep = on_policy("asleep", {**greedy, "sleep": True}, SGLANG, teacher={"sleep": True})
    for process in [start(run) for run in (awake, asleep)]:  # at once: most of the time is that of engines that start
        finish(process)
    for run in (awake, asleep):
        assert max(event["rollout_gap"] for event in events(run["output"], "step")) < 0.1
    # One token that two logits in bf16 leave open changes all that follows.
    assert losses(asleep["output"])[:2] == pytest.approx(losses(awake["output"])[:2], rel=2e-2)
