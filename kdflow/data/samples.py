"""Tokenized samples: of stored sources at once, in worker processes, kept on disk; of streamed ones as they come."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from filelock import FileLock

from kdflow._version import __version__
from kdflow.cache import cache_folder, code_of
from kdflow.config import DataConfig, SourceConfig
from kdflow.contracts import DatasetReader, KdflowError, Message, Pair, Sample, TargetAlignment, Tokens
from kdflow.data import lines, rendering, sources, tokenization
from kdflow.data.lines import Record
from kdflow.data.sources import Records, RecordStream, open_records, stream_records
from kdflow.data.tokenization import PairTokenizer, Prepared
from kdflow.files import sync
from kdflow.plugins import Plugins

_SIDES = ("student", "teacher")
_INT = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features({
    "id": datasets.Value("string"),
    "problem": datasets.Value("string"),
    "dropped": datasets.Value("string"),
    "truncated": datasets.Value("bool"),
    "chat": datasets.Value("bool"),
    **{f"{side}_{part}": _INT for side in _SIDES for part in ("ids", "targets", "response", "spans")},
    "path": _INT,
    **{f"{side}_bytes": datasets.Value("int64") for side in _SIDES},
})  # fmt: skip
_ROWS_PER_WORKER = 500  # a process is not worth starting for fewer


@dataclass(frozen=True)
class Preparation:
    """From a record to a pair of token sequences: the fields, the format and the tokenizers of one source.

    ``needs_prompt`` refuses samples that ask nothing, which the student could not answer itself.
    """

    reader: DatasetReader
    fields: dict[str, str]
    tokenize: PairTokenizer
    needs_prompt: bool = False

    def __call__(self, record: Record) -> Prepared:
        """A pair, or why there is none; never an error, since one wrong record need not end a run."""
        name, content = record
        if isinstance(content, str):
            return Prepared(name, problem=f"{name}: {content}")
        try:
            content = {**content, **{field: content[source] for field, source in self.fields.items()}}
        except KeyError as error:
            has = ", ".join(sorted(content))
            return Prepared(
                name, problem=f"{name}: the field {error}, named in fields, is missing; the record has {has}"
            )
        try:
            sample = self._read(content)
            if self.needs_prompt and not sample.messages and not sample.prompt:
                raise ValueError(
                    "there is no prompt that the student could answer itself; rollout.fraction needs one in every "
                    "sample, as the formats chat and prompt_response have it"
                )
            return self.tokenize(sample, name)
        except KdflowError as error:
            return Prepared(name, problem=str(error))
        except ValueError as error:
            return Prepared(name, problem=f"{name}: {error}")

    def _read(self, content: Mapping[str, Any]) -> Sample:
        """The record as the reader has it, which may be anybody's: what it forgets to check is told as its own."""
        owner = f"the reader of the format '{self.reader.name}'"
        try:
            sample: Any = self.reader.read(content)
        except KeyError as error:
            raise ValueError(f"{owner} found no {error}; the record has {', '.join(sorted(content))}") from None
        except (KdflowError, ValueError):
            raise
        except Exception as error:  # None.strip() of an empty field, say: the next record may do
            raise ValueError(f"{owner} failed: {type(error).__name__}: {error}") from error
        if not isinstance(sample, Sample):
            raise ValueError(f"{owner} gave {sample!r:.80}, not a Sample")
        texts: list[Any] = [sample.prompt, sample.response, sample.teacher_prompt or ""]
        messages: Any = sample.messages
        if not isinstance(messages, tuple | list):
            raise ValueError(f"{owner} gave {messages!r:.80} as messages, not a tuple of them")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, Message):
                raise ValueError(f"{owner} gave {message!r:.80} as message {number}, not a Message")
            texts += (message.role, message.content)
        for place, text in enumerate(texts):
            if not isinstance(text, str):  # names are made only now: most records are good
                numbers = range(1, len(messages) + 1)
                turns = [f"message {number}'s {part}" for number in numbers for part in ("role", "content")]
                name = ["prompt", "response", "teacher_prompt", *turns][place]
                raise ValueError(f"{owner} gave {text!r:.80} as {name}, not text")
        return sample

    @property
    def key(self) -> str:
        """A hash of all that the result depends on, but for the records."""
        code = [code_of(type(self.reader)), *map(inspect.getsource, (lines, rendering, sources, tokenization))]
        parts = [__version__, *code, repr(self.reader.options), json.dumps(self.fields), self.tokenize.key,
                 str(self.needs_prompt)]  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class SampleTable:
    """Prepared samples of a stored source, mapped from disk; ``records`` is the hash of the source, by its name."""

    def __init__(self, rows: datasets.Dataset, records: dict[str, str], weight: float = 1.0) -> None:
        self.weight, self.records = weight, records
        # Its own way to the columns: a row through the library takes ten times as long.
        self._columns = {name: rows.data.column(name) for name in _FEATURES}

    def __len__(self) -> int:
        return len(self._columns["id"])

    def __getitem__(self, index: int) -> Prepared:
        name, problem, dropped = (self._value(part, index) for part in ("id", "problem", "dropped"))
        if problem or dropped:
            return Prepared(name, dropped=dropped, problem=problem)
        student, teacher = (self._tokens(side, index) for side in _SIDES)
        assert student is not None
        pair = Pair(name, student, teacher, self._alignment(index), chat=self._value("chat", index))
        return Prepared(name, pair, truncated=self._value("truncated", index))

    def _alignment(self, index: int) -> TargetAlignment | None:
        student, teacher = (self._numbers(f"{side}_spans", index) for side in _SIDES)
        if student is None or teacher is None:
            return None
        path = self._numbers("path", index)
        return TargetAlignment(student, teacher, None if path is None else path.reshape(-1, 2))

    def _tokens(self, side: str, index: int) -> Tokens | None:
        ids, targets, response = (self._numbers(f"{side}_{part}", index) for part in ("ids", "targets", "response"))
        if ids is None or targets is None or response is None:
            return None
        return Tokens(ids, targets, response, text_bytes=self._value(f"{side}_bytes", index))

    def _value(self, column: str, index: int) -> Any:
        return self._columns[column][index].as_py()

    def _numbers(self, column: str, index: int) -> np.ndarray | None:
        """int64."""
        numbers = self._columns[column][index].values
        return None if numbers is None else numbers.to_numpy().astype(np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """The student's tokens of each sample; 0 of one that cannot be used."""
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(self._columns["student_ids"])
        return np.asarray(lengths.fill_null(0))

    @property
    def chat(self) -> bool:
        """Whether a sample is a conversation."""
        import pyarrow.compute

        return bool(pyarrow.compute.any(self._columns["chat"]).as_py())

    @property
    def problems(self) -> list[tuple[str, str]]:
        """Names of the records that cannot be used, and why."""
        column = self._columns["problem"]
        if column.null_count == len(column):
            return []
        names = self._columns["id"]
        return [(names[i].as_py(), text) for i, text in enumerate(column.to_pylist()) if text]


class SampleStream:
    """Prepared samples of a streamed source, from any number on."""

    def __init__(self, name: str, read: Callable[[int], Iterator[Prepared]], weight: float = 1.0) -> None:
        self.name, self.read, self.weight = name, read, weight

    @property
    def chat(self) -> bool:
        """Whether the first sample that can be used is a conversation; False where there is none."""
        pairs = (prepared.pair for prepared in self.read(0))
        return next((pair.chat for pair in pairs if pair is not None), False)


def open_tables(
    configs: Sequence[SourceConfig],
    data: DataConfig,
    plugins: Plugins,
    tokenize: PairTokenizer,
    needs_prompt: bool = False,
) -> list[SampleTable]:
    """Tokenize sources, or find them tokenized.

    Raises:
        KdflowError: a source is missing or empty, or holds a record that cannot be used and ``data.on_error`` is stop.
    """
    tables = []
    for config in configs:
        prepare = preparation(config, plugins, tokenize, needs_prompt)
        records = open_records(config)
        table = SampleTable(_tokenized(records, prepare, data.workers), {records.name: records.key}, config.weight)
        if data.on_error == "stop" and (problems := table.problems):
            more = f"\nand {len(problems) - 1} more like it; data.on_error=skip leaves them out" if problems[1:] else ""
            raise KdflowError(problems[0][1] + more)
        tables.append(table)
    return tables


def open_streams(
    configs: Sequence[SourceConfig], plugins: Plugins, tokenize: PairTokenizer, needs_prompt: bool = False
) -> list[SampleStream]:
    """Open sources that are tokenized as they are read, each by whoever reads it, which may be a thread of its own."""
    streams = []
    for config in configs:
        # A copy: a tokenizer's settings, such as whether special tokens are split, are those of its last caller.
        prepare = copy.deepcopy(preparation(config, plugins, tokenize, needs_prompt))
        records = stream_records(config)

        def read(first: int, prepare: Preparation = prepare, records: RecordStream = records) -> Iterator[Prepared]:
            return map(prepare, records.read(first))

        streams.append(SampleStream(config.path, read, config.weight))
    return streams


def preparation(
    config: SourceConfig, plugins: Plugins, tokenize: PairTokenizer, needs_prompt: bool = False
) -> Preparation:
    """How the records of a source become pairs."""
    cls: type[DatasetReader] = plugins.find(config.format, "data format").cls
    return Preparation(cls(cls.Options(**config.options())), config.fields, tokenize, needs_prompt)


def _tokenized(records: Records, prepare: Preparation, workers: int | None) -> datasets.Dataset:
    """Tokenize once for given records, tokenizers and options; whoever comes second waits for the first."""
    key = hashlib.sha256(f"{records.key} {records.name} {prepare.key}".encode()).hexdigest()[:32]
    folder = cache_folder("tokens") / key
    with FileLock(f"{folder}.lock"):
        if (found := _whole(folder, len(records))) is None:
            staging = folder.with_name(f"{key}.part")
            for old in (staging, folder):
                shutil.rmtree(old, ignore_errors=True)
            try:
                staging.mkdir()
                _tokenize_to(staging / "tokens.arrow", records, prepare, workers)
                for file in staging.iterdir():
                    sync(file)
                staging.rename(folder)
            except OSError as error:
                why = error.strerror or error
                raise KdflowError(
                    f"{folder.parent} cannot be written to: {why}; mend it, or set KDFLOW_CACHE"
                ) from None
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            found = _whole(folder, len(records))
    if found is None:
        raise KdflowError(f"{folder} cannot be read although it was just written; mend its disk, or set KDFLOW_CACHE")
    return found


def _whole(folder: Path, count: int) -> datasets.Dataset | None:
    """What was tokenized, if all of it is there: whoever clears away old files may leave some, or a part of one."""
    parts = sorted(str(file) for file in folder.glob("*.arrow"))
    try:
        rows = datasets.concatenate_datasets([datasets.Dataset.from_file(part) for part in parts])
    except (OSError, ValueError):  # of pyarrow, or of datasets where there is none
        return None
    return rows if len(rows) == count else None


def _tokenize_to(file: Path, records: Records, prepare: Preparation, workers: int | None) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread a worker, and no warning about forks
    workers = workers or min(_cores(), len(records) // _ROWS_PER_WORKER)
    processes = workers if workers > 1 else None  # none but this one

    def rows(numbers: dict[str, list[int]]) -> dict[str, list[Any]]:
        prepared = [_row(prepare(records[number])) for number in numbers["number"]]
        return {name: [row[name] for row in prepared] for name in _FEATURES}

    # Only where a person sees it: a bar that is redrawn makes a long file of a log.
    show = datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars
    show()
    environment = os.environ
    try:
        datasets.Dataset.from_dict({"number": range(len(records))}).map(
            rows, batched=True, batch_size=100, remove_columns=["number"], features=_FEATURES, num_proc=processes,
            cache_file_name=str(file), new_fingerprint=file.parent.name, desc=f"tokenizing {records.name}",
        )  # fmt: skip
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise KdflowError(
            f"a process that tokenizes {records.name} was killed, most likely since memory ran out: data.workers=1 "
            "takes the least"
        ) from None
    finally:
        os.environ = environment  # noqa: B003  datasets leaves a copy in its place, which others do not know of


def _cores() -> int:
    """That this process may use, which a batch system or a container often limits; macOS does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _row(prepared: Prepared) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_FEATURES)
    row |= {
        "id": prepared.id,
        "problem": prepared.problem,
        "dropped": prepared.dropped,
        "truncated": prepared.truncated,
    }
    if prepared.pair is not None:
        for side, tokens in zip(_SIDES, (prepared.pair.student, prepared.pair.teacher), strict=True):
            if tokens is not None:
                row |= {f"{side}_ids": tokens.ids, f"{side}_targets": tokens.targets}
                row |= {f"{side}_response": tokens.response, f"{side}_bytes": tokens.text_bytes}
        row["chat"] = prepared.pair.chat
        if (alignment := prepared.pair.alignment) is not None:
            row |= {"student_spans": alignment.student, "teacher_spans": alignment.teacher}
            row["path"] = None if alignment.path is None else alignment.path.ravel()
    return row
