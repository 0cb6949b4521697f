"""A model's responses to a file of prompts, for sequence-level distillation (Kim and Rush, arXiv 1606.07947).

Prompts are answered a window at a time, in their order, and windows begin at the same prompts after a kill: what is
written is what would have been written without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdflow.config import Choice, RunConfig, SourceConfig
from kdflow.contracts import EngineContext, KdflowError, Rollout, RolloutEngine, Sampling
from kdflow.data.formats import read_teacher_prompt
from kdflow.data.prompts import Prompt, read_prompt
from kdflow.data.rendering import SideTokenizer
from kdflow.data.sources import Records, open_records, whole_record
from kdflow.evaluation.answers import is_correct
from kdflow.files import sha256
from kdflow.models.loading import config_digest, context_length, load_tokenizer, weights_digest
from kdflow.runtime.checkpoint import MANIFEST
from kdflow.runtime.export import exported, find_checkpoint, student_of
from kdflow.runtime.prepare import prepare
from kdflow.runtime.processes import Processes
from kdflow.runtime.responses import Progress, Responses, require_regular

Keep = Literal["all", "verified"]
# Is told of the progress and of the number of prompts.
Report = Callable[[Progress, int], None]
# Responses that are written at a time: what a kill costs at most, and enough for an engine to fill its batches.
_WINDOW = {"cpu": 32, "cuda": 512}


def generate(
    run: str | Path | Mapping[str, Any],
    prompts: Path,
    output: Path,
    sampling: Sampling,
    overrides: Sequence[str] = (),
    *,
    checkpoint: Path | None = None,
    keep: Keep = "all",
    engine: Choice = Choice(name="transformers"),  # noqa: B008 - frozen
    block: Iterable[str] = (),
    report: Report = lambda progress, total: None,
) -> Progress:
    """Write the responses of a run's teacher, or of a trained student, to ``prompts``; goes on where it was stopped.

    Args:
        run: path of a run file, or its content.
        prompts: JSON lines (or another data file) of ``messages`` or ``prompt``, and maybe ``answer``
            and ``teacher_prompt``, which a teacher sees as it does in training.
        output: where the records go, each with its response, ``finish`` and ``sample``.
        sampling: how responses are drawn; the ids that end them are added here.
        overrides: ``key=value`` with dotted keys.
        checkpoint: a run directory or a checkpoint, whose student responds instead of the teacher.
        keep: ``"verified"`` writes of each prompt the first response whose final answer is the record's ``answer``.
        engine: the rollout engine and its options.
        block: plugins that are not loaded.
        report: told of the progress and of the number of prompts, at the beginning and after each window.

    Raises:
        KdflowError: a prompt cannot be used, ``output`` holds something else, or something in the run cannot work.
    """
    sampling.require_different()
    require_regular(output)  # before prompts are read, which may take long
    config, plugins = prepare(run, overrides, block)
    cls, options = plugins.configured("rollout engine", engine.name, engine.options())
    model, owner, source = _model(config, checkpoint)
    records = open_records(SourceConfig(path=str(prompts), format="chat"))
    tokenizer = SideTokenizer(load_tokenizer(model), owner)
    ids, stop_ids, own = _read(records, tokenizer, keep, context_length(model), sampling.max_new_tokens)
    settings = {
        "prompts": records.key, owner: str(source or model), "engine": {"name": engine.name, **options.binding()},
        "dtype": config.training.dtype, "n": sampling.n, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens, "seed": sampling.seed, "keep": keep,
        # The same path may hold another model by now. A checkpoint's manifest tells the hashes of its files.
        "weights": weights_digest(model) if source is None else sha256(source / MANIFEST),
        "config": config_digest(model), "tokenizer": tokenizer.key, **({"teacher_prompt": True} if own else {}),
    }  # fmt: skip
    sampling = replace(sampling, stop_ids=(*sampling.stop_ids, *stop_ids))
    with Processes() as processes:
        processes.require_one("generate", "to use several, split the prompts into files")
        context = EngineContext(processes.device, getattr(torch, config.training.dtype))
        with Responses(output, settings, len(ids)) as written:
            report(written.progress, len(ids))
            if written.progress.prompts < len(ids):
                with (
                    _weights(model, source, output, config.training.dtype) as path,
                    closing(cls(path, options, context)) as responder,
                ):
                    _respond(responder, sampling, records, ids, tokenizer.tokenizer, keep, written, report)
            return written.progress


def _respond(
    engine: RolloutEngine,
    sampling: Sampling,
    records: Records,
    ids: Sequence[np.ndarray],
    tokenizer: Any,
    keep: Keep,
    written: Responses,
    report: Report,
) -> None:
    """Answer the prompts that are left, a window at a time."""
    progress, window = written.progress, max(1, _WINDOW[engine.context.device.type] // sampling.n)
    for first in range(progress.prompts, len(ids), window):
        numbers = range(first, min(first + window, len(ids)))
        started = time.perf_counter()
        try:
            rollouts = engine.respond([ids[number].tolist() for number in numbers], sampling)
        except KdflowError as error:
            raise KdflowError(f"{error}\nThe same command goes on where it stopped") from None
        progress.seconds += time.perf_counter() - started
        lines = []
        for number, of_prompt in zip(numbers, rollouts, strict=True):
            prompt = read_prompt(whole_record(records, number)[1])
            lines += _chosen(prompt, of_prompt, tokenizer, keep, progress)
        written.append(lines, len(numbers))
        report(progress, len(ids))


def _model(config: RunConfig, checkpoint: Path | None) -> tuple[str, str, Path | None]:
    """Who responds: the model whose tokenizer it has, its part in the run, and the checkpoint with its weights."""
    if checkpoint is not None:
        found = find_checkpoint(checkpoint)
        student, _ = student_of(found)
        return student.model, "student", found
    if config.teacher is None:
        raise KdflowError("the run file names no teacher: add teacher.model, or give --checkpoint for the student")
    return config.teacher.model, "teacher", None


@contextmanager
def _weights(model: str, checkpoint: Path | None, output: Path, dtype: str) -> Iterator[str]:
    """The directory or hub id that an engine loads: a checkpoint is exported beside the output for as long."""
    if checkpoint is None:
        yield model
        return
    aside = output.with_name(f".{output.name}.student")
    with exported(checkpoint, aside, dtype, "make room there, or give another output") as student:
        yield student


def _read(
    records: Records, tokenizer: SideTokenizer, keep: Keep, positions: int | None, new: int
) -> tuple[list[np.ndarray], tuple[int, ...], bool]:
    """The ids of every prompt, those that end a response, and whether a record has another prompt for the teacher.

    Raises:
        KdflowError: a record cannot be used; names it.
    """
    ids: list[np.ndarray] = []
    stop_ids: tuple[int, ...] = ()
    chat = own = False
    for number in range(len(records)):
        name, record = whole_record(records, number)
        try:
            prompt = read_prompt(record)
            asked = prompt.sample
            # As in training: what the teacher alone sees, the student is to do without.
            if tokenizer.owner == "teacher" and (other := read_teacher_prompt(record)) is not None:
                if not other.strip():
                    raise ValueError("'teacher_prompt' is empty; give it a text, or leave it out")
                asked, own = replace(asked, teacher_prompt=other).for_teacher(), True
            found = tokenizer.prompt(asked)
            if number == 0:
                chat, stop_ids = bool(asked.messages), tokenizer.stop_ids(asked)
            if bool(prompt.sample.messages) != chat:
                here, first = ("'prompt'", "'messages'") if chat else ("'messages'", "'prompt'")
                raise ValueError(f"the record has {here}, and the first one {first}: they are trained on as two files")
            json.dumps(record)
        except (ValueError, TypeError) as error:  # tables hold dates and the like, which JSON cannot say
            raise KdflowError(f"{name}: {error}") from None
        if keep == "verified" and prompt.answer is None:
            raise KdflowError(f"{name}: to keep verified responses every record needs the field 'answer'")
        if positions is not None and len(found) + new > positions:
            raise KdflowError(
                f"{name}: the prompt's {len(found)} tokens and {new} new ones are more than the {positions} positions "
                "of the model; leave the record out, or lower max_new_tokens"
            )
        ids.append(np.asarray(found, dtype=np.int32))
    return ids, stop_ids, own


def _chosen(
    prompt: Prompt, rollouts: Sequence[Rollout], tokenizer: Any, keep: Keep, progress: Progress
) -> list[dict[str, Any]]:
    """The records to write of one prompt; counts what becomes of its responses."""
    records = []
    for sample, rollout in enumerate(rollouts):
        text = _text(rollout, tokenizer)
        progress.responses += 1
        progress.tokens += len(rollout.ids)
        progress.truncated += rollout.finish == "length"
        if not text.strip():
            progress.empty += 1
        elif keep == "all" or is_correct(text, str(prompt.answer)):
            records.append({**prompt.answered(text), "finish": rollout.finish, "sample": sample})
    if keep == "verified":
        progress.unsolved += not records
        records = records[:1]
    progress.kept += len(records)
    return records


def _text(rollout: Rollout, tokenizer: Any) -> str:
    if rollout.finish == "stop":
        return str(tokenizer.decode(rollout.ids[:-1], skip_special_tokens=True))
    # A response that was cut off may end inside a character.
    return str(tokenizer.decode(rollout.ids, skip_special_tokens=True)).rstrip("\ufffd")
