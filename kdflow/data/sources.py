"""Files of JSON lines, checked line by line when they are opened, and then read from disk through ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from kdflow.config import SourceConfig
from kdflow.contracts import DatasetReader, KdflowError, Sample
from kdflow.plugins import Plugins


class Source:
    """The samples of one file, in its order."""

    def __init__(self, path: Path, reader: DatasetReader) -> None:
        self.path, self._reader = path, reader
        self._rows = _open(path, reader)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> tuple[str, Sample]:
        """The sample and its id, ``file:line``."""
        row = self._rows[index]
        name = f"{self.path}:{row['line']}"
        try:
            return name, self._reader.read(json.loads(row["json"]))
        except ValueError as error:  # the reader is another than the one that checked the file
            raise KdflowError(f"{name}: {error}") from None


class Sources:
    """Several files, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources)

    def sample(self, index: int) -> tuple[str, Sample]:
        """Sample ``index`` of all, and its id."""
        for source in self._sources:
            if index < len(source):
                return source.sample(index)
            index -= len(source)
        raise IndexError(index)


def open_sources(configs: Sequence[SourceConfig], plugins: Plugins) -> Sources:
    """Open every file of a run.

    Raises:
        KdflowError: a file is missing, empty, or has a line that is no JSON or does not fit its format.
    """
    return Sources([Source(Path(c.path), plugins.find(c.format, "data format").cls()) for c in configs])


def _open(path: Path, reader: DatasetReader) -> datasets.Dataset:
    if not path.is_file():
        raise KdflowError(f"{path}: there is no such data file")
    status = path.stat()
    # The arguments are the key of the cache: a file that changed is read again.
    arguments = {
        "path": str(path.resolve()), "name": str(path), "size": status.st_size, "modified": status.st_mtime_ns,
        "reader": type(reader),
    }  # fmt: skip
    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_generator(_lines, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, KdflowError):
            raise error.__cause__ from None
        raise
    return rows


def _lines(path: str, name: str, size: int, modified: int, reader: type[DatasetReader]) -> Iterator[dict[str, Any]]:
    read, count = reader().read, 0
    try:
        with open(path, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    problem = f"{error.msg} (column {error.colno})"
                    raise KdflowError(f"{name}:{number}: this line is no JSON: {problem}") from None
                if not isinstance(record, dict):
                    raise KdflowError(f"{name}:{number}: a line must be a JSON object, not {type(record).__name__}")
                try:
                    read(record)
                    json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
                except ValueError as error:
                    raise KdflowError(f"{name}:{number}: {error}") from None
                count += 1
                yield {"line": number, "json": line}
    except UnicodeDecodeError as error:
        raise KdflowError(f"{name}: the file is not UTF-8: {error}") from None
    if count == 0:
        raise KdflowError(f"{name}: the data file is empty")
