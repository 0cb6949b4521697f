"""Records of a data source, whatever keeps them: JSON lines, CSV, Parquet, what ``datasets`` saved, or the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets

from kdflow.config import SourceConfig
from kdflow.contracts import KdflowError
from kdflow.data.lines import GZIP, SEPARATORS, Lines, Record, kept, quiet, stream_lines
from kdflow.files import sha256

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PARQUET = ".parquet"
_FILES = {".json", ".jsonl", *SEPARATORS, GZIP, _PARQUET}


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
        opened: Records = _Table(config.path, *_parquet(path)) if path.suffix.lower() == _PARQUET else Lines(path)
    elif path.is_dir():
        key = _hash_directory(path) + config.split + str(config.config)
        rows = _saved(path, config) if _is_saved(path) else _load(config, streaming=False, key=key)
        opened = _Table(config.path, rows, key)
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
    if path.is_file() and path.suffix.lower() != _PARQUET:

        def records(first: int) -> Iterator[Record]:
            return stream_lines(path, first)
    else:
        if path.is_file():
            rows = _parquet(path, streaming=True)[0]
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


def _parquet(path: Path, streaming: bool = False) -> tuple[Any, str]:
    """Rows, and the hash of the file. datasets itself would tell files of one date by nothing else."""
    key = sha256(path)
    try:
        with quiet():
            if streaming:
                return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True), key
            return kept(key, lambda folder: datasets.Dataset.from_parquet(str(path), cache_dir=folder)), key
    except KdflowError:  # of the cache
        raise
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


def _load(config: SourceConfig, streaming: bool, key: str | None = None) -> Any:
    """What ``datasets`` reads; of a directory, whose files it tells by their dates, by a key of what is in it."""

    def load(folder: str | None) -> Any:
        return datasets.load_dataset(
            config.path, config.config, split=config.split, revision=config.revision, streaming=streaming,
            cache_dir=folder,
        )  # fmt: skip

    try:
        with quiet():
            return load(None) if key is None else kept(hashlib.sha256(key.encode()).hexdigest(), load)
    except KdflowError:  # of the cache
        raise
    except Exception as error:
        raise KdflowError(
            f"{config.path} (config {config.config or 'default'}, split {config.split}) cannot be loaded: "
            f"{_first_lines(error, 2)}"  # the second tells the configurations that there are
        ) from None


def _require_hub_id(config: SourceConfig) -> None:
    if not _HUB_ID.fullmatch(config.path) or Path(config.path).suffix.lower() in _FILES:
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
