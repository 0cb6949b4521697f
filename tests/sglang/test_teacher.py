"""The teacher in SGLang, against transformers: rows, probes, slots and faults."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdflow.contracts import EngineContext, KdflowError, Lease, ModelSpec, Options, Pair, Tokens, Transport
from kdflow.data.packing import collate
from kdflow.engines.sglang import rows as rows_module
from kdflow.engines.sglang import teacher as module
from kdflow.engines.sglang.rows import Asked
from kdflow.engines.sglang.slots import TokenIds
from kdflow.engines.sglang.teacher import SGLangTeacher
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.models.head import HeadAndEmbeddings
from kdflow.runtime.run import train
from tests.engines.test_transformers import expected_rows, make_batch
from tests.sglang.support import CPU, gone, held_files, load, members, schedulers, until
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


def embedded(model: str) -> TransformersTeacher:
    return TransformersTeacher(model, Options(), EngineContext(CPU, torch.float32))


def changed(model: str, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model, each moved by a tenth of its deviation."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        yield name, weight + 0.1 * torch.randn(weight.shape, generator=generator) * weight.std()


def in_a_file(path: Path, ids: list[int]) -> TokenIds:
    """Ids that an engine can be sent."""
    np.array(ids, np.int32).tofile(path)
    return TokenIds(str(path), 0, len(ids))


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


def test_an_engine_that_has_nothing_to_do_leaves_its_cores_alone(engine: SGLangTeacher) -> None:
    (scheduler,) = schedulers(engine._engine._process.pid)

    def seconds() -> float:
        user, system = Path(f"/proc/{scheduler}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    score(engine).release()
    time.sleep(0.5)
    before = seconds()
    time.sleep(3)
    assert seconds() - before < 1


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
    lease = engine.score(tokens)
    assert lease.rows.shape == (0, 48)
    lease.release()


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
    assert [ids.length for ids in sent[0][1]] == [23, 12, 7]


def test_a_slow_student_is_waited_for_and_nothing_is_overwritten(
    engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [score(engine, seed) for seed in range(4)]
    before = [lease.rows.clone() for lease in leases]
    fifth: list[Lease] = []
    thread = threading.Thread(target=lambda: fifth.append(score(engine, 4)))
    thread.start()
    thread.join(2.0)
    assert thread.is_alive(), "there is no free slot"
    assert all(torch.equal(lease.rows, rows) for lease, rows in zip(leases, before, strict=True))
    monkeypatch.setattr(module, "_LENT", 0.1)
    with pytest.raises(KdflowError, match=r"all 4 slots of the teacher's rows were in use for 0.1 s"):
        score(engine, 5)
    leases[0].release()
    thread.join(60)
    assert all(torch.equal(lease.rows, rows) for lease, rows in zip(leases[1:], before[1:], strict=True))
    assert not torch.equal(fifth[0].rows[:5], before[0][:5])
    fifth[0].release()
    fifth[0].release()  # a second time does nothing
    for lease in leases[1:]:
        lease.release()
    assert sorted(engine._slots._free) == [0, 1, 2, 3]


def test_micro_batches_that_are_scored_together_are_asked_for_once(
    engine: SGLangTeacher, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [tokens for seed in range(4) if (tokens := make_batch(seed).teacher) is not None]
    sent: list[Any] = []
    ask = engine._engine.ask
    monkeypatch.setattr(engine._engine, "ask", lambda *message: sent.append(message) or ask(*message))
    leases = engine.score_all(batches[: engine.at_once])
    assert len(leases) == 4
    assert len(sent) == 1
    lengths = [[len(ids) for ids, _ in batch.on_host.sequences()] for batch in batches]
    assert [ids.length for ids in sent[0][1]] == [length for one in lengths for length in sorted(one, reverse=True)]
    other = embedded(tiny["teacher"])
    for batch, lease in zip(batches, leases, strict=True):
        assert lease.digest == batch.digest
        torch.testing.assert_close(lease.rows, other.score(batch).rows, rtol=1e-5, atol=1e-5)
        lease.release()
    monkeypatch.setattr(module, "_LENT", 0.1)
    with pytest.raises(KdflowError, match="all 4 slots"):
        engine.score_all([*batches, batches[0]])
    assert sorted(engine._slots._free) == [0, 1, 2, 3], "those that it had are free again"


def test_nothing_is_decoded(engine: SGLangTeacher) -> None:
    engine._slots.host.message = ""
    for seed in range(2):  # what SGLang does after an answer, it has done before the next
        score(engine, seed).release()
    assert engine._slots.host.message == ""


def test_a_micro_batch_of_samples_as_long_as_the_context_is_read_in_one_pass(tiny: dict[str, str]) -> None:
    ids, targets = np.arange(512) % 300, np.arange(400, 511)  # more than the 32,768 tokens of other passes
    batch = collate([Pair("", Tokens(ids, targets, np.zeros_like(targets)))] * 68, False).student
    engine = load(tiny["teacher"], max_tokens=68 * 512)
    try:
        before = engine._slots.host.passes
        lease = engine.score(batch)
        assert engine._slots.host.passes == before + 1
        torch.testing.assert_close(lease.rows, embedded(tiny["teacher"]).score(batch).rows, rtol=1e-5, atol=1e-5)
    finally:
        engine.close()


def test_too_many_tokens_for_a_slot_or_for_the_model(engine: SGLangTeacher, tmp_path: Path) -> None:
    batch = make_batch()
    assert batch.teacher is not None
    long = dataclasses.replace(batch.teacher, input_ids=torch.zeros(257, dtype=torch.int64))
    with pytest.raises(KdflowError, match="a micro-batch of 257 tokens exceeds the 256 that a slot holds"):
        engine.score(long)
    with pytest.raises(KdflowError, match=r"sglang 0\.5\.\d+ refuses the request: .*600 tokens.*context length"):
        engine._engine.ask("prefill", [in_a_file(tmp_path / "long", [5] * 600)], ["kdflow-0-0-0-0-1"])
    score(engine).release()


# --- embeddings, and new weights ---


def test_embeddings_are_those_of_the_embedded_teacher(engine: SGLangTeacher, tiny: dict[str, str]) -> None:
    assert "_embeddings" not in vars(engine), "read before they were asked for"
    ids = torch.tensor([5, 0, 391, 5])
    assert torch.equal(engine.embed(ids), embedded(tiny["teacher"]).embed(ids))
    assert engine._embeddings.weight is engine.head.weight, "a second copy of what is tied"


@pytest.mark.parametrize("name", ["student", "untied"], ids=["tied", "untied"])
def test_new_weights_reach_all_parts_and_outlive_the_engine(name: str, tiny: dict[str, str]) -> None:
    engine, other, ids = load(tiny[name]), embedded(tiny[name]), torch.arange(384)

    def same_as_embedded(seed: int) -> None:
        batch = make_batch(seed)
        assert batch.teacher is not None
        lease, expected = engine.score(batch.teacher), other.score(batch.teacher)
        torch.testing.assert_close(lease.rows, expected.rows, rtol=1e-5, atol=1e-5)
        lease.release()
        assert torch.equal(engine.head.weight, other.head.weight)

    for seed in (1, 2):  # the embeddings are asked for after the first of them
        before = other.head.weight.clone()
        for one in (engine, other):
            one.update_weights(changed(tiny[name], seed))
        assert not torch.equal(other.head.weight, before)
        same_as_embedded(seed)
        assert torch.equal(engine.embed(ids), other.embed(ids))
    for process in schedulers(engine._engine._process.pid):
        os.kill(process, signal.SIGKILL)
    same_as_embedded(3)
    for process in schedulers(engine._engine._process.pid):
        os.kill(process, signal.SIGKILL)
    for one in (engine, other):
        one.update_weights(changed(tiny[name], 4))
    same_as_embedded(4)
    engine.close()


def test_new_weights_reach_experts(tmp_path: Path) -> None:
    make_architecture("qwen3-moe", hidden_size=64).save_pretrained(tmp_path)
    engine, other, batch = load(str(tmp_path)), embedded(str(tmp_path)), make_batch().teacher
    assert batch is not None
    weights = {name: weight.roll(1, -1) for name, weight in other._model.named_parameters() if "experts" in name}
    before = other.score(batch).rows
    for one in (engine, other):
        one.update_weights(iter(weights.items()))
    rows = other.score(batch).rows
    assert not torch.allclose(rows, before, atol=1e-2)
    torch.testing.assert_close(engine.score(batch).rows, rows, rtol=1e-4, atol=1e-4)
    engine.close()


def test_new_weights_that_engine_and_head_disagree_on_are_refused(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny["untied"])
    ask = engine._engine.ask
    with monkeypatch.context() as patch:
        patch.setattr(engine._engine, "ask", lambda *message: message[0] == "update_weights" or ask(*message))
        with pytest.raises(KdflowError, match="differ from the engine's own"):
            engine.update_weights(changed(tiny["untied"], 1))
    engine.update_weights(changed(tiny["untied"], 1))
    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "update", lambda _: None)
        with pytest.raises(KdflowError, match="differ from the engine's own"):
            engine.update_weights(changed(tiny["untied"], 2))
    assert sorted(engine._slots._free) == [0, 1, 2, 3]
    with pytest.raises(KdflowError, match="LlamaForCausalLM has no weight 'other'"):
        engine.update_weights(iter([("other", torch.zeros(2))]))
    engine.close()


def test_an_engine_of_several_copies_takes_no_weights_and_ends_with_any_of_its_schedulers(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    engine = load(tiny["untied"], data_parallel=2, max_tokens=12)  # fewer than the probe has
    with pytest.raises(KdflowError, match="data_parallel: SGLang gives new weights to one copy of a model alone"):
        engine.update_weights(changed(tiny["untied"], 1))
    group = engine._engine._process.pid
    held, (_, last) = held_files(group), schedulers(group)
    os.kill(last, signal.SIGKILL)
    until(lambda: gone(group, held), "the end of the engine", 30)
    engine.close()


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
    assert len(engine._slots._free) == 4


def test_the_probe_refuses_rows_shifted_by_one(engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    expect = engine._rows.expect

    def shifted(slot: int, sequences: Any) -> list[Asked]:
        asked = expect(slot, sequences)
        engine._slots.host.positions[slot, : sum(one.request.count for one in asked)] += 1
        return asked

    monkeypatch.setattr(engine._rows, "expect", shifted)
    with pytest.raises(KdflowError, match="differ from the engine's own"):
        engine.probe()


@pytest.mark.parametrize("call", [SGLangTeacher.probe, score])
@pytest.mark.parametrize("fault", ["extra BOS", "last token lost", "another token"])
def test_other_tokens_than_were_sent_are_refused(
    fault: str, call: Callable[[SGLangTeacher], Any], engine: SGLangTeacher, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    ask = engine._engine.ask
    faults: dict[str, Callable[[list[int]], list[int]]] = {
        "extra BOS": lambda ids: [1, *ids],
        "last token lost": lambda ids: ids[:-1],
        "another token": lambda ids: [*ids[:-2], ids[-2] + 1, ids[-1]],
    }

    def change(ids: TokenIds) -> TokenIds:
        return in_a_file(tmp_path / str(ids.offset), faults[fault](ids.read()))

    def other(kind: str, ids: Any, rids: Any) -> Any:
        return ask(kind, change(ids) if kind == "log_probabilities" else [change(one) for one in ids], rids)

    monkeypatch.setattr(engine._engine, "ask", other)
    with pytest.raises(KdflowError, match="read other tokens than it was sent"):
        call(engine)
    assert len(engine._slots._free) == 4


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


def test_an_engine_that_is_closed_while_it_is_asked_has_not_failed(
    tiny: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """As when a run is interrupted while the next rows are asked for ahead."""
    engine = load(tiny["teacher"])
    group = engine._engine._process.pid
    for scheduler in schedulers(group):
        os.kill(scheduler, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(score, engine)
        until(lambda: engine._engine._lock.locked(), "the question", 30)
        engine.close()
        with pytest.raises(KdflowError, match="is closed"):
            asked.result(timeout=30)
    assert (members(group), engine.restarts, "failed" in caplog.text) == ([], 0, False)


def test_an_engine_ends_with_its_scheduler_also_where_sglangs_own_signal_is_lost(
    tiny: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang would end its process by SIGQUIT to itself, which is blocked here; before a call, and during one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})
    try:
        engine = load(tiny["teacher"], timeout=60.0)
        before = score(engine)
        rows, group = before.rows.clone(), engine._engine._process.pid
        before.release()
        held = held_files(group)
        (scheduler,) = schedulers(group)
        os.kill(scheduler, signal.SIGKILL)
        until(lambda: gone(group, held), "the end of the engine", 30)
        lease = score(engine)
        torch.testing.assert_close(lease.rows, rows, rtol=1e-6, atol=1e-6)
        lease.release()
        (scheduler,) = schedulers(engine._engine._process.pid)
        os.kill(scheduler, signal.SIGSTOP)
        leases: list[Lease] = []
        thread = threading.Thread(target=lambda: leases.append(score(engine)))
        thread.start()
        thread.join(1.0)
        assert thread.is_alive(), "the scheduler stands still"
        os.kill(scheduler, signal.SIGKILL)
        thread.join()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGQUIT})
    torch.testing.assert_close(leases[0].rows, rows, rtol=1e-6, atol=1e-6)
    assert caplog.text.count("its process ended") == engine.restarts == 2
    engine.close()


def test_an_engine_that_dies_asleep_wakes_as_another(tiny: dict[str, str]) -> None:
    """On a CPU SGLang has no memory to give back: what is asked of it, and in which order, is all that shows."""
    engine, other = load(tiny["untied"]), embedded(tiny["untied"])
    for one in (engine, other):
        one.update_weights(changed(tiny["untied"], 1))
    batch = make_batch().teacher
    assert batch is not None
    for kill in (False, True):
        for _ in range(2):  # the second time it sleeps already, or is awake
            engine.sleep()
        for process in schedulers(engine._engine._process.pid) if kill else ():
            os.kill(process, signal.SIGKILL)
        for _ in range(2):
            engine.wake()
        lease = engine.score(batch)
        torch.testing.assert_close(lease.rows, other.score(batch).rows, rtol=1e-5, atol=1e-5)
        lease.release()
    assert engine.restarts == 1
    assert sorted(engine._slots._free) == [0, 1, 2, 3]
    engine.close()


def test_an_engine_that_never_comes_up_is_given_up(tiny: dict[str, str]) -> None:
    with pytest.raises(KdflowError, match=r"does not start with .*: it gave no answer in 0.5 s; .* its start_timeout"):
        load(tiny["teacher"], start_timeout=0.5)


def test_what_sglang_says_against_an_option_is_told(tiny: dict[str, str]) -> None:
    with pytest.raises(KdflowError, match=r"(?s)does not start with .*its process ended; its last words:.*no-such"):
        load(tiny["teacher"], quantization="no-such")


def test_what_an_engine_died_of_after_its_start_is_told(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HOOK", "tests.sglang.guarded:dying")
    with pytest.raises(KdflowError, match=r"(?s)does not start with .*its process ended; its last words:.*no more of"):
        load(tiny["teacher"])


def test_a_hook_that_matches_no_module_is_an_error(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (module, rows_module):
        monkeypatch.setattr(place, "MODULE", "no_such_module")
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
    right = HeadAndEmbeddings.head.fget
    assert right is not None
    monkeypatch.setattr(HeadAndEmbeddings, "head", property(lambda self: dataclasses.replace(right(self), scale=1.01)))
    run = run_file()
    run["teacher"]["engine"] = {"name": "sglang"}
    with pytest.raises(KdflowError, match="differ from the engine's own"):
        train(run)
    assert not (Path(run["output"]) / "metrics.jsonl").exists()
