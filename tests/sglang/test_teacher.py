"""The teacher in SGLang, against transformers: rows, probes, slots and faults."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdflow.contracts import Head, KdflowError, Lease, ModelSpec, Transport
from kdflow.data.packing import collate
from kdflow.engines.sglang import teacher as module
from kdflow.engines.sglang.slots import Request
from kdflow.engines.sglang.teacher import SGLangTeacher
from tests.engines.test_transformers import expected_rows, make_batch
from tests.sglang.support import gone, held_files, load, members, schedulers
from tests.support.architectures import make_architecture
from tests.support.fast import fast

__all__ = ["fast"]


@pytest.fixture(scope="module")
def engine(tiny: dict[str, str]) -> Iterator[SGLangTeacher]:
    """One engine for most tests; its exporter raises where rows become Python numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_HOOK", "tests.sglang.guarded:exporter")
        engine = load(tiny["teacher"])
    yield engine
    group, held = engine._engine._process.pid, held_files(engine._engine._process.pid)
    assert held
    engine.close()
    assert gone(group, held)


def score(engine: SGLangTeacher, seed: int = 0) -> Lease:
    batch = make_batch(seed)
    assert batch.teacher is not None
    return engine.score(batch.teacher)


def test_rows_are_the_hidden_states_at_the_targets(engine: SGLangTeacher, tiny: dict[str, str]) -> None:
    for seed in range(3):
        batch = make_batch(seed)
        rows, logits = expected_rows(tiny["teacher"], batch)
        assert batch.teacher is not None
        lease = engine.score(batch.teacher)
        assert lease.digest == batch.teacher.digest
        torch.testing.assert_close(lease.rows, rows, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(engine.head.logits(lease.rows), logits, rtol=1e-5, atol=1e-4)
        lease.release()
    assert engine.spec == ModelSpec(hidden_size=48, vocab_size=392)
    assert engine.transport == Transport("shared_memory", copies_per_row=1, bytes_per_row=48 * 4)


def test_scattered_targets_and_sequences_without_any(engine: SGLangTeacher, tiny: dict[str, str]) -> None:
    batch = make_batch()
    assert batch.teacher is not None
    targets = torch.cat([batch.teacher.targets[:3:2], batch.teacher.targets[-12::3]])  # none in the second sequence
    assert not ((targets >= 12) & (targets < 19)).any()
    tokens = dataclasses.replace(batch.teacher, targets=targets)
    rows, _ = expected_rows(tiny["teacher"], dataclasses.replace(batch, teacher=tokens))
    lease = engine.score(tokens)
    torch.testing.assert_close(lease.rows, rows, rtol=1e-5, atol=1e-5)
    lease.release()


def test_a_micro_batch_without_targets_gives_no_rows(engine: SGLangTeacher) -> None:
    tokens = collate((), with_teacher=True).teacher
    assert tokens is not None
    assert engine.score(tokens).rows.shape == (0, 48)


def test_rows_become_no_python_numbers_on_the_students_side(
    engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("rows took a detour through Python")

    batch = make_batch()
    assert batch.teacher is not None
    monkeypatch.setattr(Tensor, "tolist", refuse)
    monkeypatch.setattr(Tensor, "cpu", refuse)
    engine.score(batch.teacher).release()


def test_the_longest_sequence_is_sent_first(engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    ask = engine._engine.ask
    monkeypatch.setattr(engine._engine, "ask", lambda *message: sent.append(message) or ask(*message))
    score(engine).release()
    assert [len(ids) for ids in sent[0][1]] == [23, 12, 7]


def test_a_slow_student_is_waited_for_and_nothing_is_overwritten(
    engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [score(engine, seed) for seed in (0, 1)]
    before = [lease.rows.clone() for lease in leases]
    third: list[Lease] = []
    thread = threading.Thread(target=lambda: third.append(score(engine, 2)))
    thread.start()
    thread.join(2.0)
    assert thread.is_alive(), "there is no free slot"
    assert all(torch.equal(lease.rows, rows) for lease, rows in zip(leases, before, strict=True))
    monkeypatch.setattr(engine, "_timeout", 0.1)
    with pytest.raises(KdflowError, match=r"all 2 slots of the teacher's rows were in use for 0.1 s"):
        score(engine, 3)
    leases[0].release()
    thread.join(60)
    assert torch.equal(leases[1].rows, before[1])
    assert not torch.equal(third[0].rows[:5], before[0][:5])
    third[0].release()
    third[0].release()  # a second time does nothing
    leases[1].release()
    assert sorted(engine._slots._free) == [0, 1]


def test_too_many_tokens_for_a_slot_or_for_the_model(engine: SGLangTeacher, tiny: dict[str, str]) -> None:
    batch = make_batch()
    assert batch.teacher is not None
    long = dataclasses.replace(batch.teacher, input_ids=torch.zeros(257, dtype=torch.int64))
    with pytest.raises(KdflowError, match="a micro-batch of 257 tokens exceeds the 256 that a slot holds"):
        engine.score(long)
    with pytest.raises(KdflowError, match=r"sglang 0\.5\.\d+ refuses the request: .*600 tokens.*context length"):
        engine._engine.ask("prefill", [[5] * 600], ["kdflow-0-0-0-0-1"])
    score(engine).release()


# --- what must not be trained with ---


@pytest.mark.parametrize("change", ["weight", "rows of the weight", "scale", "softcap", "bias"])
def test_the_probe_refuses_another_head(change: str, engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.probe() < 1e-5
    head = engine.head
    wrong = {
        "weight": dataclasses.replace(head, weight=head.weight * 1.001),
        "rows of the weight": dataclasses.replace(head, weight=head.weight.roll(1, 0)),
        "scale": dataclasses.replace(head, scale=1.01),
        "softcap": dataclasses.replace(head, softcap=30.0),
        "bias": dataclasses.replace(head, bias=torch.linspace(0, 0.1, len(head.weight))),
    }
    monkeypatch.setattr(engine, "_head", wrong[change])
    with pytest.raises(KdflowError, match=r"differ from the engine's own by .* at most 0\.0001 expected"):
        engine.probe()
    assert len(engine._slots._free) == 2


def test_the_probe_refuses_rows_shifted_by_one(engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    expect = engine._expect

    def shifted(slot: int, sequences: Any) -> list[Request]:
        requests = expect(slot, sequences)
        engine._slots.host.positions[slot, : requests[-1].first + requests[-1].count] += 1
        return requests

    monkeypatch.setattr(engine, "_expect", shifted)
    with pytest.raises(KdflowError, match="differ from the engine's own"):
        engine.probe()


@pytest.mark.parametrize("call", [SGLangTeacher.probe, score])
@pytest.mark.parametrize("fault", ["extra BOS", "last token lost", "another token"])
def test_other_tokens_than_were_sent_are_refused(
    fault: str, call: Callable[[SGLangTeacher], Any], engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = engine._engine.ask
    faults: dict[str, Callable[[list[int]], list[int]]] = {
        "extra BOS": lambda ids: [1, *ids],
        "last token lost": lambda ids: ids[:-1],
        "another token": lambda ids: [*ids[:-2], ids[-2] + 1, ids[-1]],
    }
    change = faults[fault]

    def other(kind: str, ids: Any, rids: Any) -> Any:
        return ask(kind, change(ids) if kind == "log_probabilities" else [change(one) for one in ids], rids)

    monkeypatch.setattr(engine._engine, "ask", other)
    with pytest.raises(KdflowError, match="read other tokens than it was sent"):
        call(engine)
    assert len(engine._slots._free) == 2


def test_new_weights_are_refused(engine: SGLangTeacher) -> None:
    with pytest.raises(KdflowError, match="takes no new weights"):
        engine.update_weights(iter(()))


# --- faults ---


def test_an_engine_that_hangs_is_started_again(engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = score(engine)
    before, group = lease.rows.clone(), engine._engine._process.pid
    lease.release()
    monkeypatch.setattr(engine._engine, "_timeout", 5.0)
    for scheduler in schedulers(group):
        os.kill(scheduler, signal.SIGSTOP)
    lease = score(engine)
    torch.testing.assert_close(lease.rows, before, rtol=1e-6, atol=1e-6)
    lease.release()
    assert engine._engine._process.pid != group
    assert members(group) == []


def test_an_engine_that_never_comes_up_is_given_up(tiny: dict[str, str]) -> None:
    with pytest.raises(KdflowError, match=r"'sglang' does not start with .*: it gave no answer in 0.5 s"):
        load(tiny["teacher"], start_timeout=0.5)


def test_what_sglang_says_against_an_option_is_told(tiny: dict[str, str]) -> None:
    with pytest.raises(KdflowError, match=r"(?s)does not start with .*its process ended; its last words:.*no-such"):
        load(tiny["teacher"], quantization="no-such")


def test_a_hook_that_matches_no_module_is_an_error(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MODULE", "no_such_module")
    with pytest.raises(KdflowError, match=r"no hidden states came out of sglang 0\.5\.\d+: .*'no_such_module'"):
        load(tiny["teacher"])


def test_two_tensor_parallel_processes_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_architecture("qwen3", dtype=torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    engine, batch = load(str(tmp_path), torch.bfloat16, tensor_parallel=2), make_batch()
    assert len(schedulers(engine._engine._process.pid)) == 2
    rows, _ = expected_rows(str(tmp_path), batch, torch.bfloat16)
    assert batch.teacher is not None
    found = engine.score(batch.teacher).rows
    assert found.dtype == torch.bfloat16
    engine.close()
    assert float((found - rows).float().norm() / rows.float().norm()) < 3e-2


def test_a_wrong_head_ends_a_run_before_its_first_step(
    run_file: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdflow.models.head
    from kdflow.runtime.run import train

    right = kdflow.models.head.load_head

    def wrong(*arguments: Any) -> Head:
        return dataclasses.replace(right(*arguments), scale=1.01)

    monkeypatch.setattr(kdflow.models.head, "load_head", wrong)
    run = run_file()
    run["teacher"]["engine"] = {"name": "sglang"}
    with pytest.raises(KdflowError, match="differ from the engine's own"):
        train(run)
    assert not (Path(run["output"]) / "metrics.jsonl").exists()
