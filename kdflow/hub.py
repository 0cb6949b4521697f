"""The Hugging Face hub, asked with patience that ends: what it has on this machine, and what it gives."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kdflow.cache import cache_directory

HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
HUB_SECONDS = 8.0  # for the hub's first answer


class Unavailable(Exception):
    """One source does not give what was asked for; the message says why."""


def cached(model: str) -> Path:
    """Where kdflow itself keeps the model with this id, once it has made it."""
    return cache_directory() / "models" / model.replace("/", "--")


def snapshot(
    model: str, wanted: Sequence[str], unwanted: Sequence[str], is_complete: Callable[[Path], bool], expected: str
) -> str:
    """The directory of files of a hub id, out of the hub's cache on this machine or fetched.

    Args:
        model: a hub id.
        wanted: patterns of the files to fetch.
        unwanted: patterns of files among them that are left.
        is_complete: whether a directory holds all that is needed.
        expected: what that is, in words.

    Raises:
        Unavailable: it cannot be reached, or has not what is needed.
    """
    try:
        folder = _snapshot(model, wanted, unwanted, is_complete)
    except Unavailable:
        raise
    except Exception as error:  # the hub's, the disk's, or its HTTP library's, which is another one every few versions
        raise Unavailable(reason(error)) from error
    if not is_complete(Path(folder)):
        raise Unavailable(f"it has the id, but not {expected}")
    return folder


def _snapshot(model: str, wanted: Sequence[str], unwanted: Sequence[str], is_complete: Callable[[Path], bool]) -> str:
    from huggingface_hub import HfApi, is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    download = partial(snapshot_download, model, allow_patterns=list(wanted), ignore_patterns=list(unwanted))
    try:
        folder = download(local_files_only=True)
        if is_complete(Path(folder)):
            return folder
    except LocalEntryNotFoundError:
        pass
    if is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unavailable("not asked, since HF_HUB_OFFLINE is set; its cache on this machine has no complete copy")
    _within(HUB_SECONDS, partial(HfApi().model_info, model, timeout=HUB_SECONDS / 2))
    say(f"fetching {model} from the Hugging Face hub, once")
    return download()


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Make a call but give up on it: HTTP's time-out covers neither names nor the many addresses of one name."""
    outcome: list[Exception | None] = []

    def work() -> None:
        try:
            call()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome[0] is not None:
        raise outcome[0]


def reason(error: Exception) -> str:
    """The kind of an error and its text, on one line of bearable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}"


def say(line: str) -> None:
    """One line of progress."""
    print(f"kdflow: {line}", file=sys.stderr, flush=True)
