"""What of the engine sglang needs no SGLang: slots, the exporter, processes; the rest is in tests/sglang."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdflow.contracts import EngineContext, KdflowError, ModelBytes
from kdflow.engines.sglang import exporter as exporter_module
from kdflow.engines.sglang import process_group, server
from kdflow.engines.sglang.exporter import Exporter, digests
from kdflow.engines.sglang.handover import Handover
from kdflow.engines.sglang.kv_cache import KVCache
from kdflow.engines.sglang.process import EngineDied, EngineProcess
from kdflow.engines.sglang.rollout import SGLangRollout, SGLangRolloutOptions
from kdflow.engines.sglang.rows import Rows
from kdflow.engines.sglang.slots import FAILED, HOST, UNUSED, Layout, Request, Slots, TokenIds, digest, place_factors
from kdflow.engines.sglang.supervisor import Supervisor
from kdflow.engines.sglang.teacher import SGLangTeacher, SGLangTeacherOptions
from kdflow.engines.sglang.team import Team
from kdflow.runtime.prepare import prepare
from kdflow.validation import validate_options

CPU = torch.device("cpu")
RunFile = Callable[..., dict[str, Any]]
LAYOUT = Layout(slots=2, tokens=32, hidden_size=4, dtype="bfloat16")


def batch(**lengths: int) -> Any:
    """A forward batch as far as an exporter looks at it."""
    return SimpleNamespace(
        rids=list(lengths), extend_seq_lens_cpu=list(lengths.values()),
        forward_mode=SimpleNamespace(is_extend=lambda: True),
    )  # fmt: skip


def call(exporter: Exporter, ids: Tensor, hidden: Tensor, requests: dict[str, int]) -> None:
    exporter(None, (ids, hidden, None, batch(**requests)), None)


def states(tokens: int) -> Tensor:
    return torch.arange(tokens * 4, dtype=torch.bfloat16).view(tokens, 4)


def test_a_request_id_says_where_rows_belong_and_other_ids_are_left_alone() -> None:
    request = Request(slot=1, sequence=3, first=40, count=12)
    assert Request.parse(request.rid(7)) == request
    assert request.rid(7) != request.rid(8)
    assert Request.parse("5f1c9e0a-health-check") is None


def told(ids: Tensor) -> int:
    """What the student expects."""
    return int(digest(ids.numpy(), place_factors(32)))


def test_the_exporter_writes_the_rows_that_are_wanted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(LAYOUT, CPU)
    exporter = Exporter(slots.config)
    assert slots.host.state == HOST
    slots.rows.fill_(-1)
    ids, hidden = torch.arange(20) * 3, states(20)
    slots.host.positions[1, :5] = torch.tensor([1, 2, 3, 0, 4], dtype=torch.int32)  # one run, then two alone

    def refuse(*_: Any) -> Any:
        raise AssertionError("rows took a detour through Python")

    monkeypatch.setattr(Tensor, "tolist", refuse)
    monkeypatch.setattr(Tensor, "cpu", refuse)
    # The longest came first; a sequence of somebody else lies between.
    requests = {Request(1, 0, 0, 3).rid(0): 9, "warm-up": 4, Request(1, 1, 3, 2).rid(1): 7}
    call(exporter, ids, hidden, requests)
    assert slots.host.state == HOST, slots.host.message
    assert torch.equal(slots.rows[1, :5], hidden[[1, 2, 3, 13, 17]])
    assert bool((slots.rows[0] == -1).all())
    assert bool((slots.rows[1, 5:] == -1).all())
    assert slots.host.digests[1, :2].tolist() == [told(ids[:9]), told(ids[13:])]
    assert slots.host.passes == 1


def test_sequences_in_any_order_are_served_together_where_their_rows_are_neighbours() -> None:
    slots, generator = Slots(LAYOUT, CPU), torch.Generator().manual_seed(0)
    exporter = Exporter(slots.config)
    lengths, counts = [5, 9, 1, 7, 3], [4, 2, 1, 5, 3]
    wanted = [torch.randperm(n, generator=generator)[:k].sort().values for n, k in zip(lengths, counts, strict=True)]
    firsts = [sum(counts[:number]) for number in range(5)]
    for number in range(5):
        slots.host.positions[1, firsts[number] :][: counts[number]] = wanted[number]
    calls = []
    for order in ([3, 0, 4], [2, 1]):  # two passes
        ids = torch.randint(0, 1000, (sum(lengths[number] for number in order),), generator=generator)
        hidden = states(len(ids)) + len(calls)
        rids = {Request(1, n, firsts[n], counts[n]).rid(n): lengths[n] for n in order}
        call(exporter, ids, hidden, rids)
        calls += list(zip(order, ids.split([lengths[n] for n in order]), hidden.split([lengths[n] for n in order]),
                          strict=True))  # fmt: skip
    assert slots.host.state == HOST, slots.host.message
    calls.sort(key=lambda one: one[0])
    assert torch.equal(slots.rows[1, :15], torch.cat([hidden[wanted[n]] for n, _, hidden in calls]))
    assert slots.host.digests[1, :5].tolist() == [told(ids) for _, ids, _ in calls]
    assert slots.host.passes == 2


def test_the_exporter_writes_no_row_of_a_token_that_the_engine_did_not_read() -> None:
    slots = Slots(LAYOUT, CPU)
    exporter = Exporter(slots.config)
    slots.host.positions[0, :2] = torch.tensor([3, 8], dtype=torch.int32)
    call(exporter, torch.arange(5), states(5), {Request(0, 0, 0, 2).rid(0): 5})
    assert slots.host.state == HOST
    assert not slots.rows.any()
    assert int(slots.host.digests[0, 0]) != told(torch.arange(9))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.arange(3), states(3).float(), None, batch(**{"kdflow-0-0-0-0-1": 3})), "float32, not torch.bfloat16"),
        ((torch.arange(3), states(3)), "2 positional arguments, not 4"),
    ],
    ids=["another dtype", "another signature"],
)
def test_a_fault_of_the_exporter_reaches_the_student_and_not_the_scheduler(
    inputs: tuple[Any, ...], message: str
) -> None:
    slots = Slots(LAYOUT, CPU)
    Exporter(slots.config)(None, inputs, None)
    assert slots.host.state == FAILED
    assert message in slots.host.message


def test_processes_that_write_into_different_memories_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With data_parallel: the student reads one memory, in which half of the rows would be old ones."""
    slots = Slots(LAYOUT, CPU)
    Exporter(slots.config)
    assert slots.host.state == HOST
    monkeypatch.setattr(exporter_module, "_cuda_rows", lambda *_: slots.host.rows)
    Exporter({**slots.config, "cuda": {}})
    assert slots.host.state == FAILED
    assert slots.host.message == "not all of the engine's processes can write into the student's CUDA memory"


def test_a_server_whose_answer_fails_ends_with_its_trace_and_not_as_if_nobody_asked(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send(("prefill", [TokenIds(str(tmp_path / "none"), 0, 1)], ["id"]))
    with pytest.raises(FileNotFoundError):
        server._serve(SimpleNamespace(generate=None), theirs)
    ours.close()
    server._serve(None, theirs)  # ends


def test_passes_that_decode_are_left_alone() -> None:
    slots = Slots(LAYOUT, CPU)
    decoding = batch(**{"kdflow-0-0-0-0-1": 3})
    decoding.forward_mode.is_extend = lambda: False
    Exporter(slots.config)(None, (torch.arange(1), states(1), None, decoding), None)
    assert slots.host.state == HOST
    assert slots.host.passes == 0


def test_digests_tell_ids_places_and_lengths_apart() -> None:
    ids = torch.tensor([5, 0, 7, 7, 3])
    others = [[1, 5, 0, 7, 7, 3], [5, 0, 7, 7], [5, 0, 7, 7, 3, 0], [5, 7, 0, 7, 3], [5, 0, 7, 7, 4], [0, 0]]
    sequences = [ids, *map(torch.tensor, others)]
    found = [told(sequence) for sequence in sequences]
    assert len(set(found)) == len(sequences)
    assert told(ids.int()) == found[0]
    by_place = torch.from_numpy(place_factors(32))
    assert digests(sequences, by_place).tolist() == found, "what the engine's side computes, several at a time"


def test_slots_are_lent_once_until_they_come_back() -> None:
    slots = Slots(LAYOUT, CPU)
    assert [slots.acquire(1), slots.acquire(1)] == [0, 1]
    with pytest.raises(KdflowError, match=r"all 2 slots .* release a lease"):
        slots.acquire(0.05)
    slots.release(1)
    assert slots.acquire(1) == 1
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(slots.acquire, 60)
        slots.close()
        with pytest.raises(KdflowError, match="are closed"):
            waiting.result(timeout=30)


def test_another_process_writes_into_the_slots_and_they_have_no_name() -> None:
    before = process_group.shared_files()
    slots = Slots(LAYOUT, CPU)
    assert slots.host.state == UNUSED
    script = (
        "import json, sys; from kdflow.engines.sglang.exporter import Exporter\n"
        "from kdflow.engines.sglang.slots import HostMemory, Layout\n"
        "config = json.loads(sys.argv[1]); Exporter(config)\n"
        "HostMemory.open(Layout(**config['layout']), config['path']).rows[1, 31] = 5\n"
    )
    subprocess.run([sys.executable, "-c", script, json.dumps(slots.config)], check=True, timeout=120)
    assert slots.host.state == HOST
    assert slots.rows.float().sum() == 4 * 5
    assert slots.rows[1, 31].float().sum() == 4 * 5
    rows = slots.rows[1]
    slots.close()
    assert rows[31, 0] == 5, "what was lent stays readable"
    assert {path for path in process_group.shared_files() - before if "kdflow" in path} == set()


def test_another_process_reads_the_ids_that_a_slot_holds() -> None:
    rows = Rows(LAYOUT, CPU, owner=0)
    ids = [np.array([7, 2, 151_935]), np.array([5]), np.array([1, 2, 3, 4])]
    asked = rows.expect(1, [(one, np.arange(len(one))[::2]) for one in ids])
    assert [one.request for one in asked] == [Request(1, 0, 0, 2), Request(1, 1, 2, 1), Request(1, 2, 3, 2)]
    assert rows.slots.host.positions[1, :5].tolist() == [0, 2, 0, 0, 2]
    rows.expect(0, [(ids[0] + 1, np.arange(1))])  # of the other slot
    script = (
        "import json, sys; from kdflow.engines.sglang.slots import TokenIds\n"
        "print(json.dumps([TokenIds(*one).read() for one in json.loads(sys.argv[1])]))\n"
    )
    told = json.dumps([one.ids for one in asked])
    read = subprocess.run([sys.executable, "-c", script, told], check=True, timeout=120, capture_output=True).stdout
    assert json.loads(read) == [one.tolist() for one in ids]


def test_the_end_of_a_process_group_takes_grandchildren_and_files_along(tmp_path: Path) -> None:
    held = Path("/dev/shm") / f"kdflow-test-{os.getpid()}"
    script = f"import subprocess, sys; f = open('{held}', 'w'); subprocess.run(['sleep', '600'])"
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(process_group.members(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process_group.held_files(process.pid) == {str(held)}
    folder = tmp_path / "folder"
    folder.mkdir()
    process_group.end(process.pid, str(folder), set(), set())
    process.wait(10)
    assert process_group.members(process.pid) == []
    assert not held.exists()
    assert not folder.exists()


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="sglang is installed, and would start")
def test_the_last_words_of_an_engine_that_cannot_start_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = EngineProcess({}, {}, start_timeout=120, timeout=1)
    with pytest.raises(EngineDied, match=r"(?s)its process ended; its last words:.*No module named 'sglang'"):
        engine.start()
    assert not engine.running
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_up_in_time_names_the_option_and_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho still loading\nexec sleep 600\n")
    slow.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(slow))
    engine = EngineProcess({}, {}, start_timeout=2, timeout=1)
    told = "it gave no answer in 2 s; if it needs longer, raise its start_timeout; its last words:\n  still loading"
    with pytest.raises(EngineDied, match=told):
        engine.start()
    assert list(tmp_path.iterdir()) == [slow]


def test_three_failures_name_what_is_the_engines_own() -> None:
    """``kdflow generate`` and ``kdflow cache`` take engines, too, that no section names, and go on by themselves."""
    engine = EngineProcess({}, {}, start_timeout=1, timeout=1)
    supervisor = Supervisor(engine, Handover(Team(), engine, CPU), "rollout.engine")
    supervisor._start = lambda started: None  # type: ignore[method-assign]

    def work() -> None:
        raise EngineDied("its process ended")

    with pytest.raises(KdflowError, match=r"failed 3 times in a row, .* its process ended\nMend the cause") as caught:
        supervisor.run(work)
    assert "--resume" not in str(caught.value)
    assert "rollout.engine." not in str(caught.value)
    supervisor.close()


def test_without_sglang_the_command_that_installs_it_is_told(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(KdflowError, match=r"teacher.engine 'sglang' needs .* pip install 'kdflow\[sglang\]'"):
        SGLangTeacher(tiny["teacher"], SGLangTeacherOptions(), EngineContext(CPU, torch.float32))


def test_options_reach_the_engine(tiny: dict[str, str]) -> None:
    teacher = SGLangTeacher.__new__(SGLangTeacher)
    teacher.context, teacher._slots = EngineContext(CPU, torch.bfloat16, max_tokens=512), Slots(LAYOUT, CPU)
    teacher._team = Team()
    options = SGLangTeacherOptions(
        tensor_parallel=4, pipeline_parallel=2, expert_parallel=4, data_parallel=3, quantization="fp8",
        memory_fraction=0.25, attention_backend="triton",
    )  # fmt: skip
    found = teacher._arguments(tiny["teacher"], options)
    wanted = {"tp_size": 4, "pp_size": 2, "ep_size": 4, "dp_size": 3, "quantization": "fp8", "dtype": "bfloat16",
              "mem_fraction_static": 0.25, "attention_backend": "triton", "disable_radix_cache": True,
              "chunked_prefill_size": -1, "skip_tokenizer_init": True, "device": "cpu"}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert found["max_total_tokens"] > 512


def test_an_engine_that_writes_keeps_its_graphs_for_decoding(tiny: dict[str, str]) -> None:
    rollout = SGLangRollout.__new__(SGLangRollout)
    rollout.context, rollout._team = EngineContext(torch.device("cuda"), torch.bfloat16), Team()
    found = rollout._arguments(tiny["student"], SGLangRolloutOptions(cache_tokens=512))
    assert found["max_total_tokens"] == 512
    assert not {name for name in found if "graph" in name}


def test_a_cache_of_pages_keeps_one_of_them_free_and_one_that_is_not_told_refuses_nothing() -> None:
    info = {"max_total_num_tokens": 64, "page_size": 16}
    assert KVCache.of(SimpleNamespace(get_server_info=lambda: info)) == KVCache(64, 16)
    assert [KVCache(64, 16).needed(*one) for one in ((16, 31), (17, 15), (60, 1))] == [64, 64, 82]
    for told in ({}, {"max_total_num_tokens": 64}, {**info, "max_total_num_tokens": None}):
        assert KVCache.of(SimpleNamespace(get_server_info=lambda told=told: told)) is None
    rollout = SGLangRollout.__new__(SGLangRollout)
    rollout._engine = EngineProcess({}, {}, start_timeout=1, timeout=1)
    rollout._require_room([([5] * 100, {"max_new_tokens": 100})])
    rollout._engine.cache = KVCache(216, 16)
    with pytest.raises(KdflowError, match=r"a cache of 216 tokens, and 229 are needed: 100 .*, 100 .* and 29 that"):
        rollout._require_room([([5] * 100, {"max_new_tokens": 100})])


def test_timeouts_are_options(tiny: dict[str, str]) -> None:
    options, context = SGLangTeacherOptions(timeout=700.0, start_timeout=9.0), EngineContext(CPU, torch.float32)
    process = options.process({}, context)
    assert (process._timeout, process._start_timeout) == (700.0, 9.0)
    assert options.arguments(tiny["teacher"], context, 0)["watchdog_timeout"] == 700.0, "SGLang does not end it before"
    assert options.patience > 3 * 709


@pytest.mark.parametrize(("device", "expected"), [("cuda", 3), ("cpu", 0)])
def test_an_engine_begins_at_its_first_gpu_if_there_are_any(tiny: dict[str, str], device: str, expected: int) -> None:
    context = EngineContext(torch.device(device), torch.bfloat16)
    assert SGLangTeacherOptions().arguments(tiny["teacher"], context, first_gpu=3)["base_gpu_id"] == expected


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (
            SGLangTeacher,
            SGLangTeacherOptions(quantization="fp8"),
            "quantization: .* in fp8 takes no new ones",
        ),
        (SGLangTeacher, SGLangTeacherOptions(data_parallel=2), "data_parallel: .* one copy of a model alone, not to 2"),
        (SGLangRollout, SGLangRolloutOptions(data_parallel=2), "data_parallel: .* one copy of a model alone, not to 2"),
    ],
    ids=["quantized", "copies", "copies that write"],
)
def test_weights_that_cannot_change_are_told_of(
    cls: type[SGLangTeacher | SGLangRollout], options: Any, message: str
) -> None:
    engine = cls.__new__(cls)
    engine.options = options
    for refused in (lambda: cls.require_updatable(options), lambda: engine.update_weights(iter(()))):
        with pytest.raises(KdflowError, match=f"^{message}"):
            refused()


def test_what_a_run_cannot_do_with_its_engine_is_refused_before_anything_is_loaded(run_file: RunFile) -> None:
    copies = {"engine": {"name": "sglang", "data_parallel": 2}}
    prepare(run_file(teacher={"model": "none", **copies}), [], [])
    made = {**run_file(), "student": {"model": "none"}}
    for section, changed in (("teacher", {"follow": {"every": 1}, **copies}), ("rollout", copies)):
        with pytest.raises(KdflowError, match=rf"{section}\.engine: data_parallel: SGLang gives new weights to one"):
            prepare({**made, section: changed}, [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_paralel": 2}, "tensor_paralel: unknown key; did you mean 'tensor_parallel'"),
        ({"memory_fraction": 1.5}, "memory_fraction: input should be less than 1"),
        ({"timeout": 0}, "timeout: input should be greater than 0"),
        ({"expert_parallel": 2, "tensor_parallel": 3}, r"expert_parallel \(2\) must divide tensor_parallel \(3\)"),
    ],
)
def test_options_are_strict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KdflowError, match=message):
        validate_options(SGLangTeacherOptions, options, "teacher.engine 'sglang'")


def test_what_an_engine_will_hold_is_bounded_by_its_share_of_the_device() -> None:
    model = ModelBytes(weights=1000, head=100, root=100, token_cache=2, row=8, max_tokens=10, device=10_000)
    cache, slot = (4 * 10 + 1024) * 2, 10 * 8
    beside = 100 + 4 * slot
    assert SGLangTeacher.device_bytes(SGLangTeacherOptions(), model) == 1000 + cache + beside
    assert SGLangTeacher.device_bytes(SGLangTeacherOptions(memory_fraction=0.1), model) == 1000 + beside
    shared = SGLangTeacherOptions(tensor_parallel=2)
    assert SGLangTeacher.device_bytes(shared, model) == (1000 + 2 * cache) // 2 + beside, "two ranks' micro-batches"
    long = dataclasses.replace(model, max_tokens=20_000, device=10**9)
    passes = (2 * 32_768 + 1024) * 2  # more than two are never of use
    assert SGLangTeacher.device_bytes(SGLangTeacherOptions(), long) == 1000 + passes + 100 + 4 * 20_000 * 8
    assert SGLangTeacher.device_bytes(SGLangTeacherOptions(placement="dedicated"), model) == 100 + 2 * slot
    assert SGLangTeacher.device_bytes(SGLangTeacherOptions(), model, asleep=True) == beside
    bucket = 1000  # that weights come through: all of them, since these are few
    assert SGLangRollout.device_bytes(SGLangRolloutOptions(), model) == 5000 + bucket, "SGLang takes what it may"
    assert SGLangRollout.device_bytes(SGLangRolloutOptions(cache_tokens=50), model) == 1000 + 50 * 2 + bucket
    assert SGLangRollout.device_bytes(SGLangRolloutOptions(), model, asleep=True) == bucket
    for size, head, bucket in ((2**30, 2**20, 2**28), (2**31, 2**29, 2**29)):  # or 256 MB, or the largest weight
        large = dataclasses.replace(model, weights=size, head=head)
        assert SGLangRollout.device_bytes(SGLangRolloutOptions(), large, asleep=True) == bucket


def test_an_engine_that_sleeps_needs_a_gpu_that_it_shares(tiny: dict[str, str]) -> None:
    keys = ("enable_memory_saver", "enable_weights_cpu_backup")
    shared = EngineContext(torch.device("cuda"), torch.bfloat16, sleeps=True)
    for context in (shared, dataclasses.replace(shared, sleeps=False)):
        arguments = SGLangTeacherOptions().arguments(tiny["teacher"], context, 0)
        assert [arguments[key] for key in keys] == [context.sleeps] * 2
    for options in (SGLangTeacherOptions(), SGLangRolloutOptions()):
        with pytest.raises(
            KdflowError, match=r"rollout\.sleep: sglang gives memory back on a GPU only; leave them out"
        ):
            options.arguments("model", dataclasses.replace(shared, device=CPU), 0)
    with pytest.raises(KdflowError, match=r"teacher\.sleep: an engine with GPUs of its own takes no memory from"):
        SGLangTeacher("model", SGLangTeacherOptions(placement="dedicated"), shared)
