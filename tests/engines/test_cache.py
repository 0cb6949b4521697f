"""Shards of target rows, and the engine that reads them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdflow.contracts import EngineContext, KdflowError, Pair, TokenBatch, Tokens, Transport
from kdflow.data.packing import collate
from kdflow.engines.cache.capture import capture_directory, identity, save_head
from kdflow.engines.cache.shards import SequenceRows, Shards, sequence_key
from kdflow.engines.cache.teacher import CacheTeacher, CacheTeacherOptions
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.runtime.capture import capture
from tests.support.models import as_pickles, make_foreign_tokenizer, make_model, make_tokenizer, write_jsonl
from tests.support.runs import make_run

CPU = torch.device("cpu")


def stored(ids: list[int], targets: list[int], hidden: int = 4) -> SequenceRows:
    """A sequence whose row at position p is all p, and its first id in the first column."""
    rows = torch.tensor(targets, dtype=torch.float32)[:, None].repeat(1, hidden)
    rows[:, 0] = ids[0]
    return SequenceRows(sequence_key(np.array(ids)), torch.tensor(targets, dtype=torch.int32), rows)


def test_rows_are_found_by_tokens_and_targets_whatever_shard_they_are_in(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.append([stored([7, 8, 9, 10], [0, 1, 2]), stored([5, 6], [0])])
    shards.append([stored([3, 4, 5], [1])])
    key = sequence_key(np.array([7, 8, 9, 10]))
    for found in (shards, Shards(tmp_path)):
        assert found.rows(key, np.array([0, 1, 2])).tolist() == [[7, 0, 0, 0], [7, 1, 1, 1], [7, 2, 2, 2]]  # type: ignore[union-attr]
        assert found.rows(key, np.array([0, 2])).tolist() == [[7, 0, 0, 0], [7, 2, 2, 2]]  # type: ignore[union-attr]
        assert found.rows(sequence_key(np.array([3, 4, 5])), np.array([1])).tolist() == [[3, 1, 1, 1]]  # type: ignore[union-attr]
        for ids, targets in (([7, 8, 9, 10], [0, 3]), ([7, 8, 9], [0]), ([5, 6], [0, 1]), ([3, 4, 5], [0])):
            assert found.rows(sequence_key(np.array(ids)), np.array(targets)) is None
            assert not found.holds(sequence_key(np.array(ids)), np.array(targets))


def test_a_later_shard_replaces_what_it_holds_again(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.append([stored([7, 8, 9], [0])])
    shards.append([stored([7, 8, 9], [0, 1])])
    for found in (shards, Shards(tmp_path)):
        assert found.targets(sequence_key(np.array([7, 8, 9]))).tolist() == [0, 1]


def test_shards_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """Reading one sequence of 64 MiB of rows takes neither their memory nor a file descriptor."""
    rows = torch.zeros(2**14, 1024)
    rows[-1] = 1
    targets = torch.arange(len(rows), dtype=torch.int32)
    last = stored([1, 2], [0], hidden=1024)
    Shards(tmp_path).append([SequenceRows(sequence_key(np.array([9])), targets, rows), last])
    del rows

    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

    descriptors, before = len(os.listdir("/proc/self/fd")), private()
    shards = Shards(tmp_path)
    assert torch.equal(shards.rows(last.key, np.array([0])), last.rows)  # type: ignore[arg-type]
    whole = shards.rows(sequence_key(np.array([9])), targets.numpy())
    assert whole is not None
    assert whole[-1, -1] == 1
    assert private() - before < 2**24
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    Shards(tmp_path).append([stored([7, 8], [0])])
    (file,) = tmp_path.glob("rows-*")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(KdflowError, match=r"rows-00000.safetensors cannot be read .* delete it, and let kdflow cache"):
        Shards(tmp_path)


def make_batch(pairs: list[Pair]) -> TokenBatch:
    batch = collate(pairs, with_teacher=True).teacher
    assert batch is not None
    return batch


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = ["It is a truth", "universally acknowledged, that", "a single man in possession"]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module", params=["teacher", "untied"])
def captured(
    request: pytest.FixtureRequest, tiny: dict[str, str], texts_file: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A teacher, with a head of its own or not, and a capture of three texts in fp32."""
    path = tmp_path_factory.mktemp("captured") / "rows"
    data = {"train": [{"path": texts_file, "format": "text"}], "eval": []}
    capture(make_run(tiny, teacher={"model": tiny[request.param]}, data=data, output="nowhere"), output=str(path))
    return tiny[request.param], path


def engine(model: str, path: Path | None, dtype: torch.dtype = torch.float32) -> CacheTeacher:
    options = CacheTeacherOptions(path=None if path is None else str(path))
    return CacheTeacher(model, options, EngineContext(CPU, dtype))


def pairs_of(texts: list[str]) -> list[Pair]:
    tokenizer, pairs = make_tokenizer(), []
    for text in texts:
        ids = np.array([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])
        targets = np.arange(len(ids) - 1)
        tokens = Tokens(ids, targets, np.zeros_like(targets))
        pairs.append(Pair(text, tokens, tokens))
    return pairs


def test_it_gives_what_the_teacher_gives(captured: tuple[str, Path]) -> None:
    model, path = captured
    real, cache = (
        TransformersTeacher(model, CacheTeacherOptions(), EngineContext(CPU, torch.float32)),
        engine(*captured),
    )
    assert cache.spec == real.spec
    assert cache.transport == Transport("mapped_files", 1, real.spec.hidden_size * 4)
    assert torch.equal(cache.head.weight, real.head.weight)
    assert dataclasses.replace(cache.head, weight=None) == dataclasses.replace(real.head, weight=None)  # type: ignore[arg-type]
    ids = torch.tensor([5, 300, 5])
    assert torch.equal(cache.embed(ids), real.embed(ids))
    assert ("embeddings" in load_file(path / "head.safetensors")) == ("untied" in model)
    first, second = pairs_of(["a single man in possession", "It is a truth"])
    batch = make_batch([first, second])
    lease = cache.score(batch)
    assert lease.digest == batch.digest
    torch.testing.assert_close(lease.rows, real.score(batch).rows, rtol=1e-6, atol=1e-6)
    # Other order, and half of the targets: as when an algorithm drops some.
    assert second.teacher is not None
    wanted = second.teacher.targets[::2]
    half = dataclasses.replace(second.teacher, targets=wanted, response=np.zeros_like(wanted))
    other = cache.score(make_batch([dataclasses.replace(second, teacher=half), first]))
    rows = lease.rows.split([len(first.student.targets), len(second.student.targets)])  # type: ignore[no-untyped-call]
    assert torch.equal(other.rows, torch.cat([rows[1][::2], rows[0]]))
    assert cache.score(make_batch([])).rows.shape == (0, cache.spec.hidden_size)
    cache.close()


def test_a_capture_is_read_in_the_dtype_of_the_run(captured: tuple[str, Path]) -> None:
    batch = make_batch(pairs_of(["It is a truth"]))
    plain, cache = engine(*captured), engine(*captured, torch.bfloat16)
    assert torch.equal(cache.score(batch).rows, plain.score(batch).rows.bfloat16())
    assert torch.equal(cache.head.weight, plain.head.weight.bfloat16())


def test_a_sample_that_was_not_captured_is_told_with_the_command(captured: tuple[str, Path]) -> None:
    batch = make_batch(pairs_of(["It is a truth", "It is no truth"]))
    with pytest.raises(KdflowError, match=r"does not hold all rows of a sample of .*kdflow cache RUN.YAML"):
        engine(*captured).score(batch)


def test_other_weights_and_another_tokenizer_are_refused(
    tiny: dict[str, str], captured: tuple[str, Path], tmp_path: Path
) -> None:
    model, path = captured
    other = make_model(tmp_path / "other", hidden=48, layers=3, seed=9, tokenizer=make_tokenizer(), padding=8)
    with pytest.raises(KdflowError, match=f"the weights .*of {other} are not those of {model}"):
        engine(other, path)
    same = shutil.copytree(model, tmp_path / "same")
    make_foreign_tokenizer().save_pretrained(same)
    with pytest.raises(KdflowError, match=f"the tokenizer or chat template of {same} are not those of {model}"):
        engine(str(same), path)


def test_weights_that_torch_saved_are_compared_too(tiny: dict[str, str], texts_file: str, tmp_path: Path) -> None:
    one, other = (make_model(tmp_path / str(seed), seed=seed, tokenizer=make_tokenizer()) for seed in (0, 1))
    rows = tmp_path / "rows"
    for model in (one, other):
        as_pickles(Path(model))
    data = {"train": [{"path": texts_file, "format": "text"}], "eval": []}
    run = make_run(tiny, teacher={"model": one}, data=data, output="nowhere")
    capture(run, output=str(rows))
    engine(one, rows)
    with pytest.raises(KdflowError, match=f"the weights of {other} are not those of {one}"):
        engine(other, rows)
    with pytest.raises(KdflowError, match=f"{rows} was captured otherwise: weights was '"):
        capture({**run, "teacher": {"model": other}}, output=str(rows))


def test_another_config_is_refused(captured: tuple[str, Path], tmp_path: Path) -> None:
    model, path = captured
    same = shutil.copytree(model, tmp_path / "same")
    config = json.loads((same / "config.json").read_text())
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (same / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(KdflowError, match=f"the settings in config.json of {same} are not those of {model}"):
        engine(str(same), path)


def test_a_capture_that_does_not_tell_the_config_is_refused(captured: tuple[str, Path], tmp_path: Path) -> None:
    model, path = captured
    old = shutil.copytree(path, tmp_path / "old")
    about = json.loads((old / "capture.json").read_text())
    del about["config"]
    (old / "capture.json").write_text(json.dumps(about))
    with pytest.raises(KdflowError, match=f"{old} was captured by an earlier kdflow.* Delete it, and capture again"):
        engine(model, old)


def test_the_weights_of_the_teacher_need_not_be_there(captured: tuple[str, Path], tmp_path: Path) -> None:
    model, path = captured
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    batch = make_batch(pairs_of(["It is a truth"]))
    assert torch.equal(engine(str(bare), path).score(batch).rows, engine(model, path).score(batch).rows)
    with pytest.raises(KdflowError, match=r"has no files of weights to find its capture by: give teacher.engine.path"):
        engine(str(bare), None)


def test_where_there_is_no_capture_the_command_is_told(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path))
    with pytest.raises(KdflowError, match=r"no capture of the teacher's rows at .*: write it .*kdflow cache RUN.YAML"):
        engine(tiny["teacher"], None)
    (tmp_path / "capture.json").write_text("{", encoding="utf-8")
    with pytest.raises(KdflowError, match=r"capture.json cannot be read"):
        engine(tiny["teacher"], tmp_path)
    (tmp_path / "capture.json").write_text(json.dumps(identity(tiny["teacher"])), encoding="utf-8")
    with pytest.raises(KdflowError, match=r"has no head.safetensors yet: let kdflow cache RUN.YAML go on"):
        engine(tiny["teacher"], tmp_path)


def test_captures_of_other_teachers_and_dtypes_lie_apart(tiny: dict[str, str]) -> None:
    found = {name: identity(tiny[name]) for name in ("teacher", "student", "foreign")}
    places = {capture_directory(None, tiny[name], one, dtype) for name, one in found.items()
              for dtype in ("float32", "bfloat16")}  # fmt: skip
    assert len(places) == 6


def test_new_weights_are_refused(captured: tuple[str, Path]) -> None:
    with pytest.raises(KdflowError, match="holds rows of a teacher that stays as it is"):
        engine(*captured).update_weights(iter([]))


def test_embeddings_that_were_not_captured_are_told(captured: tuple[str, Path], tmp_path: Path) -> None:
    model, path = captured
    copy = shutil.copytree(path, tmp_path / "copy")
    save_head(copy, engine(model, path).head, None)
    with pytest.raises(KdflowError, match=r"holds no embeddings .* kdflow cache RUN.YAML --engine transformers"):
        engine(model, copy).embed(torch.tensor([1]))
