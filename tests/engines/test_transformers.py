"""The teacher in the student's process, against transformers itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdflow.contracts import Batch, EngineContext, Head, KdflowError, Lease, ModelSpec, Options, Pair, Tokens
from kdflow.data.packing import collate
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.models import head as head_module
from kdflow.runtime.loop import Teacher
from tests.support.architectures import make_architecture

CPU = torch.device("cpu")


def load(model: str, dtype: torch.dtype = torch.float32) -> TransformersTeacher:
    return TransformersTeacher(model, Options(), EngineContext(CPU, dtype))


def make_batch(seed: int = 0) -> Batch:
    """Samples whose teacher's side is longer than the student's and has other targets."""
    generator = np.random.default_rng(seed)
    pairs = []
    for at, length in enumerate((9, 4, 20)):
        sides = []
        for extra in (0, 3):
            ids = generator.integers(3, 90, length + extra)
            targets = np.arange(extra + 1, length + extra - 1)
            sides.append(Tokens(ids, targets, np.zeros(len(targets), np.int64)))
        pairs.append(Pair(f"sample:{at}", *sides))
    return collate(pairs, with_teacher=True)


def expected_rows(model: str, batch: Batch, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states at the targets and their logits, a sample at a time through transformers' own attention."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    tokens = batch.teacher
    assert tokens is not None
    outputs = []
    for ids in tokens.input_ids.split(tokens.cu_seqlens.diff().tolist()):
        with torch.no_grad():
            outputs.append(plain(input_ids=ids[None], output_hidden_states=True, use_cache=False))
    states = torch.cat([output.hidden_states[-1][0] for output in outputs])
    logits = torch.cat([output.logits[0] for output in outputs])
    return states[tokens.targets], logits[tokens.targets]


def score(engine: TransformersTeacher, batch: Batch) -> Lease:
    assert batch.teacher is not None
    return engine.score(batch.teacher)


@pytest.mark.parametrize("name", ["teacher", "untied"])
def test_rows_are_the_hidden_states_at_the_targets(name: str, tiny: dict[str, str]) -> None:
    engine, batch = load(tiny[name]), make_batch()
    lease = score(engine, batch)
    rows, logits = expected_rows(tiny[name], batch)
    torch.testing.assert_close(lease.rows, rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(engine.head.logits(lease.rows), logits, rtol=1e-5, atol=1e-4)
    lease.release()


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "cohere2", "granite", "gpt-oss"])
def test_rows_and_head_of_other_architectures(name: str, tmp_path: Path) -> None:
    make_architecture(name).save_pretrained(tmp_path)
    engine, batch = load(str(tmp_path)), make_batch()
    rows, logits = expected_rows(str(tmp_path), batch)
    found = score(engine, batch).rows
    torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(engine.head.logits(found), logits, rtol=1e-4, atol=1e-3)


def test_bf16_stays_bf16(tiny: dict[str, str]) -> None:
    engine, batch = load(tiny["teacher"], torch.bfloat16), make_batch()
    found = score(engine, batch).rows
    assert found.dtype == engine.head.weight.dtype == torch.bfloat16
    rows, _ = expected_rows(tiny["teacher"], batch, torch.bfloat16)
    torch.testing.assert_close(found, rows, rtol=3e-2, atol=3e-2)


def test_the_digest_of_the_batch_comes_back_and_rows_are_no_part_of_a_graph(tiny: dict[str, str]) -> None:
    engine, batch = load(tiny["teacher"]), make_batch()
    lease = score(engine, batch)
    assert batch.teacher is not None
    assert lease.digest == batch.teacher.digest != batch.student.digest
    assert not lease.rows.requires_grad
    assert not any(parameter.requires_grad for parameter in engine.head.parameters())


def test_rows_outlive_the_next_micro_batch(tiny: dict[str, str]) -> None:
    engine = load(tiny["teacher"])
    rows = score(engine, make_batch()).rows
    before = rows.clone()
    score(engine, make_batch(seed=1))
    assert torch.equal(rows, before)


def test_a_micro_batch_without_targets_gives_no_rows(tiny: dict[str, str]) -> None:
    engine = load(tiny["teacher"])
    assert score(engine, collate((), with_teacher=True)).rows.shape == (0, 48)


def test_the_spec_tells_sizes_with_padding(tiny: dict[str, str]) -> None:
    assert load(tiny["teacher"]).spec == ModelSpec(hidden_size=48, vocab_size=384 + 8)
    assert load(tiny["teacher"]).head.vocab_size == 384 + 8


@pytest.mark.parametrize("name", ["student", "untied"], ids=["tied", "untied"])
def test_new_weights_change_the_rows_and_the_head(name: str, tiny: dict[str, str], tmp_path: Path) -> None:
    engine, batch = load(tiny[name]), make_batch()
    weights = {key: value * 1.5 + 0.01 for key, value in load_file(Path(tiny[name]) / "model.safetensors").items()}
    engine.update_weights(iter(weights.items()))
    changed = AutoModelForCausalLM.from_pretrained(tiny[name])
    changed.load_state_dict(weights, strict=False)
    changed.save_pretrained(tmp_path)
    rows, logits = expected_rows(str(tmp_path), batch)
    old_rows, old_logits = expected_rows(tiny[name], batch)
    found = score(engine, batch).rows
    torch.testing.assert_close(found, rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(engine.head.logits(found), logits, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found, old_rows, atol=1e-2)
    # The head by itself: on the old rows it no longer gives the old logits.
    assert not torch.allclose(engine.head.logits(old_rows), old_logits, atol=1e-2)


def test_new_weights_are_copies_in_the_teachers_dtype(tiny: dict[str, str]) -> None:
    engine = load(tiny["student"], torch.bfloat16)
    weights = load_file(Path(tiny["student"]) / "model.safetensors")
    engine.update_weights(iter(weights.items()))
    before = score(engine, make_batch()).rows
    for weight in weights.values():
        weight.zero_()
    assert before.dtype == torch.bfloat16
    assert torch.equal(score(engine, make_batch()).rows, before)


def test_a_head_that_cannot_be_read_is_refused_at_start(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = head_module.read_head

    def altered(*arguments: object) -> Head:
        return dataclasses.replace(real(*arguments), scale=0.5)  # type: ignore[arg-type]

    monkeypatch.setattr(head_module, "read_head", altered)
    with pytest.raises(KdflowError, match=r"the logits of the teacher .* cannot be recomputed"):
        load(tiny["teacher"])


def test_rows_of_other_tokens_are_refused(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, batch = load(tiny["teacher"]), make_batch()
    teacher = Teacher(engine, valid_vocab=384)
    _, side = teacher.score(batch)
    assert side.head.valid_vocab == 384
    assert side.tokens is batch.teacher
    rows = side.rows
    assert batch.teacher is not None
    for wrong in (Lease(rows, batch.student.digest), Lease(rows[:-1], batch.teacher.digest)):
        monkeypatch.setattr(engine, "score", lambda _, wrong=wrong: wrong)
        with pytest.raises(KdflowError, match="'transformers' returned rows of other tokens than it was sent"):
            teacher.score(batch)


def test_it_sleeps_wakes_and_closes(tiny: dict[str, str]) -> None:
    engine, batch = load(tiny["teacher"]), make_batch()
    before = score(engine, batch).rows
    engine.sleep()
    engine.wake()
    assert torch.equal(score(engine, batch).rows, before)
    engine.close()
