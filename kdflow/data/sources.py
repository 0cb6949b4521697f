"""Records of a data source, whatever keeps them: JSON lines, CSV, Parquet, what ``datasets`` saved, or the hub."""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets

from kdflow.cache import cache_folder, code_of
from kdflow.config import SourceConfig
from kdflow.contracts import KdflowError
from kdflow.files import sha256

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_TOO_DEEP = "its values are nested too deeply to be read"

# A record, or what is wrong with it, under a name such as ``train.jsonl:12`` or ``train.parquet[11]``.
Record = tuple[str, dict[str, Any] | str]


class Records(Protocol):
    """Records by number. ``key`` is a hash of their content, ``name`` is what a user calls them."""

    name: str
    key: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...


def open_records(config: SourceConfig) -> Records:
    """Open a source.

    Raises:
        KdflowError: it is missing or empty, or is nothing that can be read.
    """
    path = _reachable(config)
    _refuse_hub_options(config, path)
    if path.is_file():
        opened: Records = (
            _Table(config.path, _parquet(path, streaming=False), sha256(path))
            if _kind(path) == "parquet"
            else _Lines(path)
        )
    elif path.is_dir():
        rows = _saved(path, config) if _is_saved(path) else _load(config, streaming=False)
        opened = _Table(config.path, rows, _hash_directory(path) + config.split + str(config.config))
    else:
        _require_hub_id(config)
        rows = _load(config, streaming=False)
        opened = _Table(config.path, rows, rows._fingerprint)
    if len(opened) == 0:
        raise KdflowError(f"{config.path}: the data file is empty")
    return opened


def whole_record(records: Records, number: int) -> tuple[str, dict[str, Any]]:
    """A record and its name.

    Raises:
        KdflowError: it cannot be read; names it.
    """
    name, content = records[number]
    if isinstance(content, str):
        raise KdflowError(f"{name}: {content}")
    return name, content


@dataclass(frozen=True)
class RecordStream:
    """Records that are read one after the other, from any number on, and never all held.

    ``read`` raises a KdflowError that names the source, also in the middle of it.
    """

    name: str
    read: Callable[[int], Iterable[Record]]


def stream_records(config: SourceConfig) -> RecordStream:
    """Open a source as a stream.

    Raises:
        KdflowError: it is missing, or is nothing that can be read.
    """
    path = _reachable(config)
    _refuse_hub_options(config, path)
    if path.is_file() and _kind(path) != "parquet":

        def records(first: int) -> Iterator[Record]:
            for place, text, problem in itertools.islice(_read(str(path)), first, None):
                yield f"{path}{place}", problem or _parse(text)
    else:
        if path.is_file():
            rows = _parquet(path, streaming=True)
        elif path.is_dir() and _is_saved(path):
            rows = _saved(path, config).to_iterable_dataset()
        else:
            if not path.is_dir():
                _require_hub_id(config)
            rows = _load(config, streaming=True)

        def records(first: int) -> Iterator[Record]:
            for number, row in enumerate(rows.skip(first), start=first):
                yield f"{config.path}[{number}]", _without_nulls(row)

    def read(first: int) -> Iterator[Record]:
        try:
            yield from records(first)
        except KdflowError:
            raise
        except Exception as error:  # pyarrow, datasets and what fetches for them raise what they like
            raise KdflowError(
                f"{config.path} cannot be read to its end: {_first_lines(error)}; mend it, or what it is reached by"
            ) from None

    return RecordStream(config.path, read)


class _Lines:
    """A text file of one record a line, as an Arrow table of lines that is mapped, not held in memory."""

    def __init__(self, path: Path) -> None:
        self.name, self.key = str(path), sha256(path)
        # The arguments are the key of datasets' cache: a file that changed is read again, and any file by other code.
        arguments = {"path": str(path.resolve()), "key": f"{self.key} {code_of(_Lines)}", "name": self.name}
        folder = cache_folder("records")
        with _quiet():
            try:
                self._rows = datasets.Dataset.from_generator(
                    _numbered_lines, gen_kwargs=arguments, cache_dir=str(folder)
                )
            except datasets.exceptions.DatasetGenerationError as error:
                if isinstance(error.__cause__, KdflowError):
                    raise error.__cause__ from None
                if isinstance(error.__cause__, OSError):
                    why = error.__cause__.strerror or error.__cause__
                    raise KdflowError(f"{folder} cannot be written to: {why}; mend it, or set KDFLOW_CACHE") from None
                raise

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return f"{self.name}{row['place']}", row["problem"] or _parse(row["text"])


class _Table:
    """Rows of a ``datasets`` dataset."""

    def __init__(self, name: str, rows: datasets.Dataset, key: str) -> None:
        self.name, self.key, self._rows = name, key, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return f"{self.name}[{index}]", _without_nulls(self._rows[index])


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls of a table, which gives each nested object every field that one of its column has.

    They would be arguments of tool calls that nobody gave. Nulls in lists are the writer's own.
    """

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(part) for key, part in value.items() if part is not None}
        return [cleared(part) for part in value] if isinstance(value, list) else value

    return {key: cleared(value) for key, value in row.items()}


def _numbered_lines(path: str, key: str, name: str) -> Iterator[dict[str, Any]]:
    empty = True
    for place, text, problem in _read(path, name):
        empty = False
        yield {"place": place, "text": text, "problem": problem}
    if empty:
        raise KdflowError(f"{name}: the data file is empty")


def _read(path: str, name: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Places, as ``:12`` or ``[11]``, JSON texts, and what keeps a line from being one.

    Of lines, an array, or separated values.
    """
    name = name or path
    if _kind(Path(path)) == "csv":
        yield from _rows_of_values(path, name)
        return
    with open(path, "rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        begin = stream.tell()
        first = next((line for line in stream if line.strip()), b"")
        stream.seek(begin)  # blank lines count where a line is named
        if first.lstrip().startswith(b"["):
            yield from _array(stream.read(), name)
        else:
            yield from _texts(stream)


def _texts(lines: Iterable[bytes]) -> Iterator[tuple[str, str, str]]:
    """Place, text, and what is wrong with it, of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f":{number}", line.decode(), ""
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {error.start}"
                yield f":{number}", "", f"this line is not UTF-8: {byte}; convert the file to UTF-8"


def _rows_of_values(path: str, name: str) -> Iterator[tuple[str, str, str]]:
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            csv.field_size_limit(2**31 - 1)  # a text may be as long as it likes
            rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
            for row in rows:
                yield f":{rows.line_num}", json.dumps(_named(row, name, rows.line_num), ensure_ascii=False), ""
    except UnicodeDecodeError:  # it counts from where a buffer of many lines begins
        with open(path, "rb") as lines:
            place, problem = next((place, problem) for place, _, problem in _texts(lines) if problem)
        raise KdflowError(f"{name}{place}: {problem}") from None
    except csv.Error as error:
        raise KdflowError(f"{name}:{rows.reader.line_num}: this is no CSV: {error}") from None


def _named(row: dict[Any, Any], name: str, line: int) -> dict[str, str]:
    if None in row or None in row.values():
        problem = "more" if None in row else "fewer"
        raise KdflowError(f"{name}:{line}: the line has {problem} values than the first line has names")
    return row


def _array(text: bytes, name: str) -> Iterator[tuple[str, str, str]]:
    try:
        records = json.loads(text.decode())
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise KdflowError(f"{name}:{line}: this line is not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise KdflowError(f"{name}:{error.lineno}: this is no JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise KdflowError(f"{name}: {_TOO_DEEP}") from None
    for number, record in enumerate(records):  # which may stand on any line
        yield f"[{number}]", json.dumps(record), ""


def _parse(text: str) -> dict[str, Any] | str:
    """A record, or what is wrong with it."""
    try:
        record = json.loads(text.rstrip())
        if not isinstance(record, dict):
            return f"a record must be a JSON object, not {type(record).__name__}"
        json.dumps(record, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return f"this line is no JSON: {error.msg} (column {error.colno})"
    except UnicodeEncodeError as error:
        return f"{error.object[error.start]!r} is half a surrogate pair: JSON, but no text; repair it"
    except ValueError as error:
        return str(error)
    except RecursionError:
        return _TOO_DEEP
    return record


def _kind(path: Path) -> str:
    return _TABLES.get(path.suffix.lower(), "json lines")


def _parquet(path: Path, streaming: bool) -> Any:
    folder = cache_folder("records")
    try:
        with _quiet():
            if streaming:
                return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            return datasets.Dataset.from_parquet(str(path), cache_dir=str(folder))
    except Exception as error:  # pyarrow and datasets raise what they like
        raise KdflowError(f"{path}: this is no Parquet file that can be read: {_first_lines(error)}") from None


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: Path, config: SourceConfig) -> datasets.Dataset:
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:
        raise KdflowError(f"{path}: this directory was not saved whole: {_first_lines(error)}") from None
    if isinstance(rows, datasets.DatasetDict):
        if config.split not in rows:
            raise KdflowError(f"{path}: there is no split '{config.split}'; it has {', '.join(rows)}")
        rows = rows[config.split]
    elif config.split != SourceConfig.model_fields["split"].default:
        raise KdflowError(f"{path}: this directory holds one data set without splits; leave split out")
    return rows


def _load(config: SourceConfig, streaming: bool) -> Any:
    try:
        with _quiet():
            return datasets.load_dataset(
                config.path, config.config, split=config.split, revision=config.revision, streaming=streaming
            )
    except Exception as error:
        raise KdflowError(
            f"{config.path} (config {config.config or 'default'}, split {config.split}) cannot be loaded: "
            f"{_first_lines(error, 2)}"  # the second tells the configurations that there are
        ) from None


def _require_hub_id(config: SourceConfig) -> None:
    if not _HUB_ID.fullmatch(config.path) or Path(config.path).suffix.lower() in {*_TABLES, ".jsonl", ".json"}:
        where = "" if Path(config.path).is_absolute() else f" in {Path.cwd()}, where the command runs"
        raise KdflowError(f"{config.path}: there is no such data file{where}")


def _reachable(config: SourceConfig) -> Path:
    """Where the source is, if it is on this machine, of which the disk can at least say whether it is there."""
    path = Path(config.path)
    try:
        path.exists()
    except OSError as error:
        raise KdflowError(f"{path} cannot be read: {error.strerror}; mend it, or give another path") from None
    return path


def _refuse_hub_options(config: SourceConfig, path: Path) -> None:
    fields = SourceConfig.model_fields
    given = [name for name in ("config", "split", "revision") if getattr(config, name) != fields[name].default]
    if path.is_file() and given:
        raise KdflowError(f"{path} is a file: {', '.join(given)} belongs to a directory or a hub id")
    if path.exists() and config.revision is not None:
        raise KdflowError(f"{path} is on this machine: revision belongs to a hub id")


def _first_lines(error: Exception, count: int = 1) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:count])


def _hash_directory(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(f"{file.relative_to(path)}{sha256(file)}" for file in files).encode()).hexdigest()


class _quiet:
    """datasets' own progress bars off; kdflow shows its own."""

    def __enter__(self) -> None:
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        datasets.enable_progress_bars()
