"""Text files of records: JSON lines, one JSON array, or separated values; also packed by gzip."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import datasets

from kdflow.cache import cache_folder, code_of
from kdflow.contracts import KdflowError
from kdflow.files import sha256

SEPARATORS = {".csv": ",", ".tsv": "\t"}
GZIP = ".gz"
_GZIP_BEGINS = b"\x1f\x8b"
_PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh91AY": "bzip2", b"PK\x03\x04": "zip"}
_TOO_DEEP = "its values are nested too deeply to be read"

T = TypeVar("T")

# A record, or what is wrong with it, under a name such as ``train.jsonl:12`` or ``train.parquet[11]``.
Record = tuple[str, dict[str, Any] | str]


class Lines:
    """A text file of records, as an Arrow table of their texts that is mapped, not held in memory."""

    def __init__(self, path: Path) -> None:
        self.name, self.key = str(path), sha256(path)
        # A file that changed is read again, and any file by other code.
        key = hashlib.sha256(f"{self.key} {path.resolve()} {self.name} {code_of(Lines)}".encode()).hexdigest()
        folder = cache_folder("records")

        def load(kept_in: str) -> datasets.Dataset:
            arguments = {"path": str(path.resolve()), "name": self.name}
            return datasets.Dataset.from_generator(_numbered_texts, gen_kwargs=arguments, cache_dir=kept_in)

        with quiet():
            try:
                self._rows = kept(key, load)
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


def stream_lines(path: Path, first: int) -> Iterator[Record]:
    """The records of a text file from a number on, as they are read."""
    for number, (place, text, problem) in enumerate(_texts(str(path), str(path))):
        if number >= first:
            yield f"{path}{place}", problem or _parse(text)


def kept(key: str, load: Callable[[str], T]) -> T:
    """What ``load`` keeps in a folder of the key's own; it is made anew where a part of it was taken away."""
    folder = cache_folder("records") / key[:32]
    try:
        return load(str(folder))
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
        return load(str(folder))


def _numbered_texts(path: str, name: str) -> Iterator[dict[str, Any]]:
    empty = True
    for place, text, problem in _texts(path, name):
        empty = False
        yield {"place": place, "text": text, "problem": problem}
    if empty:
        raise KdflowError(f"{name}: the data file is empty")


def _texts(path: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Places, as ``:12`` or ``[11]``, JSON texts, and what keeps a line from being one."""
    suffixes = [suffix for suffix in map(str.lower, Path(path).suffixes) if suffix != GZIP]
    separator = SEPARATORS.get(suffixes[-1] if suffixes else "")
    try:
        if separator is not None:
            yield from _of_values(path, name, separator)
        else:
            with _opened(path, name) as stream:
                yield from _of_json(stream, name)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise KdflowError(f"{name}: this gzip file is damaged, or not all of it is there: {error}") from None


def _opened(path: str, name: str) -> IO[bytes]:
    """The bytes of a file, unpacked where it is packed by gzip."""
    with open(path, "rb") as stream:
        begin = stream.read(8)
    if begin.startswith(_GZIP_BEGINS):
        return cast(IO[bytes], gzip.open(path))
    for mark, packing in _PACKED.items():
        if begin.startswith(mark):
            raise KdflowError(f"{name}: this file is packed by {packing}: unpack it, or pack it by gzip instead")
    return open(path, "rb")


def _of_json(stream: IO[bytes], name: str) -> Iterator[tuple[str, str, str]]:
    """Of lines, or of an array."""
    if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        stream.seek(0)
    begin = stream.tell()
    first = next((line for line in stream if line.strip()), b"")
    stream.seek(begin)  # blank lines count where a line is named
    if first.lstrip().startswith(b"["):
        yield from _of_array(stream.read(), name)
    else:
        yield from _of_lines(stream)


def _of_lines(lines: Iterable[bytes]) -> Iterator[tuple[str, str, str]]:
    """Of each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f":{number}", line.decode(), ""
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {error.start}"
                yield f":{number}", "", f"this line is not UTF-8: {byte}; convert the file to UTF-8"


def _of_values(path: str, name: str, separator: str) -> Iterator[tuple[str, str, str]]:
    try:
        with io.TextIOWrapper(_opened(path, name), encoding="utf-8-sig", newline="") as stream:
            csv.field_size_limit(2**31 - 1)  # a text may be as long as it likes
            rows = csv.DictReader(stream, delimiter=separator, strict=True)
            names = Counter(rows.fieldnames or ())
            if twice := [column for column, count in names.items() if count > 1]:
                raise KdflowError(f"{name}:{rows.line_num}: several columns are named '{twice[0]}'; rename all but one")
            for row in rows:
                yield f":{rows.line_num}", json.dumps(_named(row, name, rows.line_num), ensure_ascii=False), ""
    except UnicodeDecodeError:  # it counts from where a buffer of many lines begins
        with _opened(path, name) as lines:
            place, problem = next((place, problem) for place, _, problem in _of_lines(lines) if problem)
        raise KdflowError(f"{name}{place}: {problem}") from None
    except csv.Error as error:
        raise KdflowError(f"{name}:{rows.reader.line_num}: this is no CSV: {error}") from None


def _named(row: dict[Any, Any], name: str, line: int) -> dict[str, str]:
    if None in row or None in row.values():
        problem = "more" if None in row else "fewer"
        raise KdflowError(f"{name}:{line}: the line has {problem} values than the first line has names")
    return row


def _of_array(text: bytes, name: str) -> Iterator[tuple[str, str, str]]:
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
    if text.strip() == "{":
        goes_on = "a record begins here and goes on below; write each on one line, or all of them as one array"
        return f"this line is no JSON: {goes_on}"
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


class quiet:
    """datasets' own progress bars off; kdflow shows its own."""

    def __enter__(self) -> None:
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        datasets.enable_progress_bars()
