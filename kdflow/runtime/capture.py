"""The teacher's rows of all samples of a run, computed once and kept: what the teacher engine ``cache`` reads.

Micro-batches are cut before it is known which rows are there already, and are computed again as a whole where some are
missing: a capture that was killed ends with the very rows of one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from kdflow.config import Choice, RunConfig
from kdflow.contracts import EngineContext, KdflowError, Lease, Pair, TeacherEngine
from kdflow.data.packing import collate
from kdflow.data.samples import SampleTable, open_tables
from kdflow.engines.cache.capture import ABOUT, HEAD, capture_directory, identity, read_about, save_head
from kdflow.engines.cache.shards import SequenceRows, Shards, sequence_key
from kdflow.engines.cache.teacher import CacheTeacher
from kdflow.models.head import read_head
from kdflow.models.loading import meta_model
from kdflow.plugins import Plugins
from kdflow.runtime.prepare import make_algorithm, prepare
from kdflow.runtime.processes import Processes
from kdflow.runtime.run_directory import changes, write_atomically
from kdflow.runtime.teacher import Teacher, require_sizes
from kdflow.runtime.tokenizers import open_tokenizers

# A shard is written when it has so many bytes of rows, or after so many seconds: what a kill costs at most.
_SHARD_BYTES, _SHARD_SECONDS = 256 * 2**20, 60.0


@dataclass(frozen=True)
class Plan:
    """What is to be captured, known before the teacher is loaded.

    Attributes:
        path: the directory of the capture.
        samples: sequences of the teacher, those that occur twice counted once.
        target_tokens: rows of all of them.
        stored_samples: sequences whose rows are there already.
        stored_target_tokens: rows of those.
        bytes_per_token: on disk, of each target token.
        head_bytes: of the teacher's head and embeddings, at most; 0 where they are there already.
        free_bytes: of the disk.
    """

    path: str
    samples: int
    target_tokens: int
    stored_samples: int
    stored_target_tokens: int
    bytes_per_token: int
    head_bytes: int
    free_bytes: int

    @property
    def needed_bytes(self) -> int:
        """What is left to be written."""
        return (self.target_tokens - self.stored_target_tokens) * self.bytes_per_token + self.head_bytes


@dataclass
class CaptureProgress:
    """How far a capture is, since its command was started: sequences and rows on disk or about to be, and seconds."""

    samples: int = 0
    target_tokens: int = 0
    seconds: float = 0.0


# Is told of the plan, and of the progress at the beginning and after each micro-batch.
Report = Callable[[Plan, CaptureProgress], None]


def capture(
    run: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    output: str | None = None,
    engine: Choice | None = None,
    block: Iterable[str] = (),
    report: Report = lambda plan, progress: None,
) -> tuple[Plan, CaptureProgress]:
    """Store the teacher's rows of ``data.train`` and ``data.eval``; goes on where it was stopped.

    Args:
        run: path of a run file, or its content.
        overrides: ``key=value`` with dotted keys.
        output: the directory to write; by default ``teacher.engine.path``, or one in kdflow's cache for this teacher.
        engine: what scores; by default the run file's, or transformers where that is cache.
        block: plugins that are not loaded.
        report: told of plan and progress.

    Raises:
        KdflowError: the disk is too small, the directory holds something else, or something in the run cannot work.
    """
    config, plugins = prepare(run, overrides, block)
    if config.teacher is None:
        raise KdflowError("the run file names no teacher whose rows could be stored: add teacher.model")
    if config.teacher.follow is not None:
        raise KdflowError(
            "teacher.follow: such a teacher changes while it is learnt from, and so do its rows: train with the "
            "teacher itself, or give teacher.model in its place"
        )
    if config.rollout_fraction > 0:
        raise KdflowError(
            "rollout.fraction: rows are stored of samples that are known beforehand, not of answers that the student "
            "writes: give 0, or train with the teacher itself"
        )
    if config.data.train[0].streaming:
        raise KdflowError(
            "data.train is streamed, and rows are stored of samples that are known beforehand: take streaming: true "
            "out, or train with the teacher itself"
        )
    model, dtype = config.teacher.model, config.training.dtype
    scorer, options = _scorer(config, plugins, engine)
    algorithm = make_algorithm(config, plugins)
    tokenize, vocabulary = open_tokenizers(config, plugins, algorithm)
    assert vocabulary is not None
    assert tokenize.teacher is not None
    samples = _Samples([
        table for sources in (config.data.train, config.data.eval)
        for table in open_tables(sources, config.data, plugins, tokenize)
    ])  # fmt: skip
    found, own = identity(model), config.teacher.engine
    given = output or (own.options().get("path") if own.name == CacheTeacher.name else None)
    path = capture_directory(given, model, found, dtype)
    about = {"model": model, **found, "dtype": dtype, "engine": {"name": scorer.name, **options.binding()}}
    with Processes() as processes, _opened(path, about) as shards:
        processes.require_one("cache", "let the engine use several GPUs, or split the data")
        progress, plan = CaptureProgress(), _plan(path, config, samples, shards)
        report(plan, progress)
        _require_disk(plan)
        if plan.needed_bytes:
            context = EngineContext(
                processes.device, getattr(torch, dtype), config.training.compile, config.data.max_tokens
            )
            teacher = Teacher(scorer(model, options, context), vocabulary.teacher_size)
            try:
                require_sizes(teacher.engine, tokenize.teacher.bytes_of)
                if not (path / HEAD).exists():
                    save_head(path, teacher.engine.head, _embeddings(teacher.engine))
                _score(
                    teacher, samples.batches(config.data.max_tokens), shards, lambda: report(plan, progress), progress
                )
            finally:
                teacher.close()
        return plan, progress


def _scorer(config: RunConfig, plugins: Plugins, engine: Choice | None) -> tuple[type[TeacherEngine], Any]:
    """The engine that scores, and its options."""
    assert config.teacher is not None
    choice = engine or config.teacher.engine
    if choice.name == CacheTeacher.name:
        if engine is not None:
            raise KdflowError("--engine cache reads captures; give the engine that computes the rows: transformers")
        choice = Choice(name="transformers")
    return plugins.configured("teacher engine", choice.name, choice.options())


class _Samples:
    """The samples of some tables, in their order, each sequence of the teacher once."""

    def __init__(self, tables: Sequence[SampleTable]) -> None:
        self._tables = tables
        # Several places where sequences have the same ids, and maybe other targets.
        self._places: dict[bytes, list[tuple[int, int]]] = {}
        for number, table in enumerate(tables):
            for row in range(len(table)):
                pair = table[row].pair
                if pair is not None and pair.teacher is not None:
                    self._places.setdefault(sequence_key(pair.teacher.ids), []).append((number, row))

    def __iter__(self) -> Iterator[tuple[bytes, Pair]]:
        """Key and pair of each sequence, with the targets of all that have its ids."""
        for key, places in self._places.items():
            first, *others = (pair for number, row in places if (pair := self._tables[number][row].pair) is not None)
            yield key, _with_targets(first, *(pair.teacher.targets for pair in others if pair.teacher is not None))

    def batches(self, max_tokens: int) -> Iterator[list[tuple[bytes, Pair]]]:
        """Neighbours, as many as ``max_tokens`` tokens hold."""
        batch: list[tuple[bytes, Pair]] = []
        room = max_tokens
        for key, pair in self:
            assert pair.teacher is not None
            size = max(len(pair.student), len(pair.teacher))
            if size > room:
                yield batch
                batch, room = [], max_tokens
            batch.append((key, pair))
            room -= size
        if batch:
            yield batch


def _with_targets(pair: Pair, *others: np.ndarray) -> Pair:
    """The pair, unaligned, with further targets of the teacher."""
    assert pair.teacher is not None
    targets = np.unique(np.concatenate([pair.teacher.targets, *others]))
    teacher = dataclasses.replace(pair.teacher, targets=targets, response=np.zeros_like(targets))
    return dataclasses.replace(pair, teacher=teacher, alignment=None)


def _plan(path: Path, config: RunConfig, samples: _Samples, shards: Shards) -> Plan:
    assert config.teacher is not None
    counts = {"samples": 0, "target_tokens": 0, "stored_samples": 0, "stored_target_tokens": 0}
    for key, pair in samples:
        assert pair.teacher is not None
        for prefix in ("", "stored_") if shards.holds(key, pair.teacher.targets) else ("",):
            counts[f"{prefix}samples"] += 1
            counts[f"{prefix}target_tokens"] += len(pair.teacher.targets)
    model = meta_model(config.teacher.model, getattr(torch, config.training.dtype))
    weight, size = read_head(model).weight, model.dtype.itemsize
    tied = model.get_input_embeddings().weight is weight
    head = 0 if (path / HEAD).exists() else weight.numel() * size * (1 if tied else 2)
    per_token = weight.shape[1] * size + np.dtype(np.int32).itemsize  # a row, and its position
    return Plan(
        str(path), **counts, bytes_per_token=per_token, head_bytes=head, free_bytes=shutil.disk_usage(path).free
    )


def _require_disk(plan: Plan) -> None:
    if plan.needed_bytes > plan.free_bytes:
        raise KdflowError(
            f"{plan.path}: {plan.needed_bytes:,} bytes are to be written, and its disk has {plan.free_bytes:,} free: "
            "free some, give another directory with --output, or take less data"
        )


def _score(
    teacher: Teacher, batches: Iterable[list[tuple[bytes, Pair]]], shards: Shards, report: Callable[[], None],
    progress: CaptureProgress,
) -> None:  # fmt: skip
    """Compute what is missing, and write it a shard at a time."""
    waiting: list[SequenceRows] = []
    started = written = time.perf_counter()
    for batch in batches:
        missing = {key for key, pair in batch if pair.teacher and not shards.holds(key, pair.teacher.targets)}
        if not missing:
            continue
        found = [rows for rows in _rows(teacher, batch, shards) if rows.key in missing]
        waiting += found
        progress.samples += len(found)
        progress.target_tokens += sum(len(rows.targets) for rows in found)
        now = time.perf_counter()
        if now - written >= _SHARD_SECONDS or sum(one.rows.nbytes for one in waiting) >= _SHARD_BYTES:
            shards.append(waiting)
            waiting, written = [], now
        progress.seconds = time.perf_counter() - started
        report()
    if waiting:
        shards.append(waiting)


def _rows(teacher: Teacher, batch: Sequence[tuple[bytes, Pair]], shards: Shards) -> list[SequenceRows]:
    """The rows of a micro-batch, sequence by sequence, in host memory; at least at the targets that are stored."""
    batch = [(key, _with_targets(pair, shards.targets(key))) for key, pair in batch]
    packed = collate([pair for _, pair in batch], with_teacher=True)
    try:
        lease, _ = teacher.score(packed.to(teacher.engine.context.device))
    except KdflowError as error:
        raise KdflowError(f"{error}\nThe same command goes on where it stopped") from None
    rows = _on_host(lease)
    sides = [(key, pair.teacher) for key, pair in batch if pair.teacher is not None]
    parts = torch.split(rows, [len(tokens.targets) for _, tokens in sides])
    return [
        SequenceRows(key, torch.from_numpy(tokens.targets.astype(np.int32)), part)
        for (key, tokens), part in zip(sides, parts, strict=True)
    ]


def _on_host(lease: Lease) -> torch.Tensor:
    """A copy of the rows, which outlives the lease."""
    rows = lease.rows.to("cpu", copy=True)
    lease.release()
    return rows


def _embeddings(engine: TeacherEngine) -> torch.Tensor | None:
    """The input embedding of every id; None where the engine gives none."""
    with suppress(KdflowError):
        return engine.embed(torch.arange(engine.spec.vocab_size, device=engine.context.device))
    return None


@contextmanager
def _opened(path: Path, about: Mapping[str, Any]) -> Iterator[Shards]:
    """The shards of a capture that nobody else writes; a new capture is begun.

    Raises:
        KdflowError: the directory holds something else, is of another teacher, is in use, or cannot be written to.
    """
    with ExitStack() as stack:
        try:
            with _disk_errors(path):
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(path / ".lock", timeout=0))
                there = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
                if there and ABOUT not in there:
                    raise KdflowError(f"{path} holds {there[0]} and is no capture: give another directory")
                if any(name.endswith(".safetensors") for name in there):
                    _require_same(path, about)
                else:  # also where an engine did not start, and nothing was captured
                    write_atomically(path / ABOUT, json.dumps(about, indent=2) + "\n")
                for part in path.glob(".*.safetensors*") if ABOUT in there else ():  # what a kill left behind
                    part.unlink()
        except filelock.Timeout:
            raise KdflowError(f"{path} is being written by another process; wait for it to end") from None
        yield Shards(path)


def _require_same(path: Path, about: Mapping[str, Any]) -> None:
    before = {**read_about(path), "model": about["model"]}  # a name, of what the hashes tell
    if changed := changes(before, about):
        raise KdflowError(
            f"{path} was captured otherwise: {'; '.join(changed)}. Give the same settings, or another directory with "
            "--output"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except filelock.Timeout:  # also an OSError
        raise
    except OSError as error:
        raise KdflowError(
            f"{path} cannot be written to: {error.strerror or error}; mend it, and the same command goes on"
        ) from None
