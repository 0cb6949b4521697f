"""The evaluators of a run file, asked of a trained student, of the teacher, or of any model."""

from __future__ import annotations

import logging
import math
import reprlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from kdflow.config import EvaluatorChoice, RunConfig, SourceConfig
from kdflow.contracts import (
    EngineContext,
    EvaluatedModel,
    Evaluator,
    KdflowError,
    Options,
    Pair,
    Sample,
    SampleError,
    Sampling,
    Tokens,
)
from kdflow.data.packing import collate, pack
from kdflow.data.rendering import SideTokenizer
from kdflow.data.sources import open_records, whole_record
from kdflow.engines.transformers.rollout import TransformersRollout, TransformersRolloutOptions
from kdflow.engines.transformers.teacher import TransformersTeacher
from kdflow.models.loading import context_length, load_tokenizer
from kdflow.ops.row_sum import rows_per_chunk
from kdflow.runtime.export import exported, find_checkpoint
from kdflow.runtime.prepare import prepare
from kdflow.runtime.processes import Processes

_log = logging.getLogger("kdflow")


def evaluate(
    run: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    checkpoint: Path | None = None,
    model: str | None = None,
    block: Iterable[str] = (),
) -> dict[str, Any]:
    """Ask every evaluator of a run file.

    Args:
        run: path of a run file, or its content.
        overrides: ``key=value`` with dotted keys.
        checkpoint: a run directory or a checkpoint, whose student is asked; by default that of the run's own output.
        model: a directory or hub id that is asked instead.
        block: plugins that are not loaded.

    Returns:
        ``model``, and ``results``: for each evaluator its name, its path and its ``figures``, each with ``value``
        (None of a count of 0), ``sum``, ``count`` and, where it is a share, a 95 % ``interval``.

    Raises:
        KdflowError: both ``checkpoint`` and ``model`` are given, the run file has no evaluators, a record cannot be
            used, an evaluator fails or returns something else than figures, or there is no model.
    """
    if checkpoint is not None and model is not None:
        raise KdflowError("--checkpoint and --model each name what is asked; give one of them")
    config, plugins = prepare(run, overrides, block)
    if not config.evaluation:
        raise KdflowError("the run file has no evaluators; add evaluation: [{name: exact_match, path: eval.jsonl}]")
    read = []
    for choice in config.evaluation:
        cls, options = plugins.configured("evaluator", choice.name, choice.options())
        read.append((choice, cls(options), _records(choice)))
    with Processes() as processes:
        processes.require_one("evaluate", "start it without a launcher")
        context = EngineContext(processes.device, getattr(torch, config.training.dtype))
        with (
            _model(config, checkpoint, model) as (asked, path),
            closing(_Subject(path, context, config.data.max_tokens)) as subject,
        ):
            results = [_ask(choice, evaluator, records, subject) for choice, evaluator, records in read]
    return {"model": asked, "results": results}


def _ask(
    choice: EvaluatorChoice, evaluator: Evaluator, records: Sequence[Mapping[str, Any]], subject: EvaluatedModel
) -> dict[str, Any]:
    """The figures of one evaluator.

    Raises:
        KdflowError: it fails, or returns something else; names its file and the evaluator.
    """
    try:
        figures = evaluator.evaluate(records, subject)
    except KdflowError:
        raise
    except Exception as error:  # plugins and their libraries raise what they like
        _log.debug(f"evaluator '{choice.name}'", exc_info=True)
        raise KdflowError(f"{choice.path}: {_told(error, records)} (evaluator '{choice.name}')") from None
    counted = {name: figure(*pair) for name, pair in _pairs(figures, choice.name).items()}
    return {"name": choice.name, "path": choice.path, "figures": counted}


def figure(total: float, count: int) -> dict[str, Any]:
    """A mean, with Wilson's 95 % interval where it is a share of whole things (J. Am. Stat. Assoc. 22, 1927)."""
    found: dict[str, Any] = {"value": total / count if count else None, "sum": total, "count": count}
    if isinstance(total, int) and 0 <= total <= count != 0:
        z, share = 1.959964, total / count
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        found["interval"] = [max(0.0, middle - half), min(1.0, middle + half)]
    return found


def _told(error: Exception, records: Sequence[Mapping[str, Any]]) -> str:
    """What an evaluator raised: its own words on a record, the record that lacks a field, or that it is at fault."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, KeyError):
        for number, record in enumerate(records, start=1):
            if not record.keys() >= set(error.args):
                fields = ", ".join(sorted(record)) or "no fields"
                return f"record {number}: the field {error} is missing; the record has {fields}"
    return f"the evaluator failed: {type(error).__name__}: {error}"


def _pairs(figures: object, evaluator: str) -> dict[str, tuple[float, int]]:
    """The sum and the count of each figure that an evaluator returned."""
    if not isinstance(figures, Mapping):
        raise KdflowError(
            f"evaluator '{evaluator}': evaluate must return its figures by name, such as {{'accuracy': (3, 4)}}, a sum "
            f"and a count, not {reprlib.repr(figures)}"
        )
    return {_name(name, evaluator): _pair(found, name, evaluator) for name, found in figures.items()}


def _name(name: object, evaluator: str) -> str:
    if not isinstance(name, str):
        raise KdflowError(f"evaluator '{evaluator}': a figure's name must be text, not {name!r}")
    return name


def _pair(found: object, name: str, evaluator: str) -> tuple[float, int]:
    """A figure's sum and count."""
    match found:
        case (Real() as total, Integral() as count) if math.isfinite(total) and int(count) >= 0:
            # As Python's own: numpy's are no JSON.
            return int(total) if isinstance(total, Integral) else float(total), int(count)
    raise KdflowError(f"evaluator '{evaluator}': its figure '{name}' must be a finite sum and a count, not {found!r}")


def _records(choice: EvaluatorChoice) -> list[dict[str, Any]]:
    opened = open_records(SourceConfig(path=choice.path, format="text"))
    return [whole_record(opened, number)[1] for number in range(len(opened))]


@contextmanager
def _model(config: RunConfig, checkpoint: Path | None, model: str | None) -> Iterator[tuple[str, str]]:
    """What is asked, for people, and the model that an engine loads; a checkpoint is exported for as long."""
    if model is not None:
        yield model, model
        return
    found = find_checkpoint(checkpoint or Path(config.output))
    room = "set TMPDIR to a folder with room for the student"
    try:
        aside = tempfile.TemporaryDirectory(prefix="kdflow-evaluate-")
    except OSError as error:
        raise KdflowError(f"there is no room for temporary files: {error.strerror or error}; {room}") from None
    with aside as folder, exported(found, Path(folder) / "student", config.training.dtype, room) as student:
        yield str(found), student


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """What is wrong with a sample is told with its number: the evaluator knows which record it is of."""
    try:
        yield
    except ValueError as error:
        raise SampleError(number, str(error)) from None


class _Subject(EvaluatedModel):
    """A model behind the embedded engines, each made when it is first needed."""

    def __init__(self, model: str, context: EngineContext, max_tokens: int) -> None:
        self._model, self._context, self._max_tokens = model, context, max_tokens
        self._tokenizer = SideTokenizer(load_tokenizer(model), "model")
        self._positions = context_length(model) or sys.maxsize
        self._writer: TransformersRollout | None = None
        self._scorer: TransformersTeacher | None = None

    def respond(self, prompts: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """The greedy response to each prompt."""
        ids = []
        for number, prompt in enumerate(prompts):
            with _naming(number):
                ids.append(self._tokenizer.prompt(prompt))
                if len(ids[-1]) + max_new_tokens > self._positions:
                    raise ValueError(
                        f"the prompt's {len(ids[-1])} tokens and {max_new_tokens} new ones are more than the "
                        f"{self._positions} positions of the model; leave the record out, or lower max_new_tokens"
                    )
        if self._writer is None:
            self._writer = TransformersRollout(self._model, TransformersRolloutOptions(), self._context)
        stop_ids = self._tokenizer.stop_ids(prompts[0]) if prompts else ()
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0, stop_ids=stop_ids)
        rollouts = self._writer.respond(ids, sampling)
        decode = self._tokenizer.tokenizer.decode
        return [str(decode(rollout.ids, skip_special_tokens=True)) for (rollout,) in rollouts]

    def log_likelihoods(self, responses: Sequence[Sample]) -> list[float]:
        """The log-probability of each response given its prompt."""
        pairs = []
        for number, response in enumerate(responses):
            with _naming(number):
                pairs.append(Pair(str(number), self._tokens(response)))
        if self._scorer is None:
            self._scorer = TransformersTeacher(self._model, Options(), self._context)
        found = [0.0] * len(responses)
        longest = max((len(pair.student) for pair in pairs), default=0)
        for packed in pack(pairs, max(self._max_tokens, longest)):
            batch = collate(packed, with_teacher=False).student.to(self._context.device)
            sums = torch.zeros(len(packed), dtype=torch.float64, device=self._context.device)
            head, rows, labels = self._scorer.head, self._scorer.score(batch).rows, batch.labels
            for at in range(0, len(rows), rows_per_chunk(head.vocab_size)):
                part = slice(at, at + rows_per_chunk(head.vocab_size))
                logs = head.logits(rows[part]).log_softmax(-1).gather(-1, labels[part, None])[:, 0]
                sums.index_add_(0, batch.response_of_target[part], logs.double())
            for pair, value in zip(packed, sums.tolist(), strict=True):
                found[int(pair.id)] = value
        return found

    def _tokens(self, sample: Sample) -> Tokens:
        """The last response's tokens as targets, the one that ends it left out.

        Raises:
            ValueError: there are none, and so nothing to compare, or more than the model has positions for.
        """
        segments = self._tokenizer.render(sample)
        tokens = self._tokenizer.tokens(segments)
        stops = self._tokenizer.stop_ids(sample)
        kept = len(tokens.targets)
        while kept and int(tokens.ids[tokens.targets[kept - 1] + 1]) in stops:
            kept -= 1
        if kept == 0:
            raise ValueError("no token of the response is left to score: the chat template or the tokenizer drops it")
        if len(tokens) > self._positions:
            raise ValueError(
                f"the {len(tokens)} tokens of prompt and response are more than the {self._positions} positions of the "
                "model; leave the record out"
            )
        return Tokens(tokens.ids, tokens.targets[:kept], tokens.response[:kept])

    def close(self) -> None:
        """Drop the engines."""
        for engine in (self._writer, self._scorer):
            if engine is not None:
                engine.close()
