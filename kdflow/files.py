"""What several rooms do with files."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside ``path`` that no other process has, for what is not whole yet; what is left of it is deleted."""
    made = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        yield made
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream of what ``path`` is to hold: readers see the old content or the new, whenever the writer dies.

    Of several processes that write it, the last one's stays. Where the block or the disk fails, nothing has changed.
    """
    with aside(path) as made:
        with made.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        made.replace(path)
        sync(path.parent)  # or a power failure could take the name away
