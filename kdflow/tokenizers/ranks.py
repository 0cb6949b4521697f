"""Byte-level BPE by the ranks of tokens: tiktoken files, and Mistral's tekken.json. Needs the tiktoken library."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from kdflow.contracts import KdflowError
from kdflow.tokenizers.families import FAMILIES, TEKKEN_SPECIAL, Family
from kdflow.tokenizers.tokenizer import SpecialTokens, Tokenizer

_LINE = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2}[ \t]+\d+\s*")


class RankTokenizer(Tokenizer):
    """A tokenizer of the tiktoken library.

    Args:
        source: where it was loaded from.
        ranks: ``{bytes: rank}``.
        pattern: the regular expression that splits text.
        special: special tokens, by role.
        added: added tokens that are a part of the text, ``{id: token}``.
        offset: what is added to a rank to make it an id.
        nfc: whether text is normalized to NFC first.
    """

    def __init__(
        self, source: str, ranks: Mapping[bytes, int], pattern: str, special: SpecialTokens, *,
        added: Mapping[int, str] | None = None, offset: int = 0, nfc: bool = False,
    ) -> None:  # fmt: skip
        try:
            import tiktoken
        except ModuleNotFoundError:
            raise KdflowError(
                f'{source} is read by the tiktoken library, which is not installed; run: pip install "kdflow[tiktoken]"'
            ) from None
        super().__init__(source, special, added=added, normalizes=("NFC",) if nfc else ())
        self._ranks, self._offset = ranks, offset
        try:
            # What tiktoken calls special it finds in a text where it is asked to.
            found = {token: index - offset for index, token in self.added.items()}
            self._encoding = tiktoken.Encoding(
                source, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=found
            )
        except ValueError as error:
            raise KdflowError(f"{source}: tiktoken refuses the pattern {pattern!r}: {error}") from None

    def normalized(self, text: str) -> bytes:
        """What of a text reaches the splitting into tokens."""
        return (unicodedata.normalize("NFC", text) if self.normalizes else text).encode()

    def _encode(self, text: str) -> list[int]:
        try:
            found = set(self.added.values())
            ids = self._encoding.encode(self.normalized(text).decode(), allowed_special=found, disallowed_special=())
        except BaseException as error:
            # Of Rust: what is no Exception would end the process.
            if type(error).__name__ != "PanicException" and not isinstance(error, ValueError):
                raise
            raise KdflowError(
                f"tiktoken gives up on a text of {len(text):,} characters, most likely for a run of hundreds of "
                f"thousands of spaces: shorten the run ({error})"
            ) from None
        return [index + self._offset for index in ids] if self._offset else ids

    def _spell(self) -> dict[int, bytes]:
        return {
            **{rank + self._offset: token for token, rank in self._ranks.items()},
            **{index: token.encode() for index, token in self.added.items()},
            **dict.fromkeys(self.special.tokens, b""),
        }


def is_rank_file(content: bytes) -> bool:
    """Whether the content of a file is that of a tiktoken file: lines of a token in base64 and its rank."""
    return _LINE.fullmatch(content.partition(b"\n")[0]) is not None


def from_rank_file(source: str, content: bytes, pattern: str | None = None) -> RankTokenizer:
    """A tiktoken file. Its split pattern and special tokens come from its family, where kdflow knows it.

    Raises:
        KdflowError: it is damaged, or its pattern is not known and none was given.
    """
    digest = hashlib.sha256(content).hexdigest()
    family = FAMILIES.get(digest)
    if pattern is not None:
        family = Family(pattern) if family is None else dataclasses.replace(family, pattern=pattern)
    if family is None:
        raise KdflowError(
            f"{source} (SHA-256 {digest}) holds ranks and no split pattern, and kdflow does not know its family; it "
            "knows Qwen2.5's and Llama 3's. Give the pattern that the model's own code uses, "
            "kdflow.tokenizers.load(path, pattern=...), or a directory with a tokenizer.json"
        )
    ranks = _read_ranks(source, content)
    first = max(ranks.values()) + 1
    special = dict(enumerate(family.special, start=first))
    ids = {token: index for index, token in special.items()}
    return RankTokenizer(
        source, ranks, family.pattern,
        SpecialTokens(special, **{role: ids[token] for role, token in family.roles.items()}),
        added=dict(enumerate(family.added, start=first + len(special))), nfc=family.nfc,
    )  # fmt: skip


def _read_ranks(source: str, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            if not _LINE.fullmatch(line):
                raise ValueError
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one
            raise KdflowError(
                f"{source}, line {number}: expected a token in base64 and its rank, not {line[:60]!r}; "
                "is the file whole?"
            ) from None
    if not ranks:
        raise KdflowError(f"{source} holds no ranks; is the file whole?")
    return ranks


def from_tekken(source: str, content: bytes) -> RankTokenizer:
    """Mistral's tekken.json: special tokens take the first ids, and only the first of its ranks are used.

    Raises:
        KdflowError: it is no tekken.json, or damaged.
    """
    try:
        data = json.loads(content)
        config: dict[str, Any] = data["config"]
        reserved = int(config["default_num_special_tokens"])
        used = data["vocab"][: int(config["default_vocab_size"]) - reserved]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in used}
        listed = data.get("special_tokens") or [{"rank": i, "token_str": t} for i, t in enumerate(TEKKEN_SPECIAL)]
        named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed}
        pattern = str(config["pattern"])
    except (ValueError, KeyError, TypeError) as error:
        raise KdflowError(
            f"{source} is no tekken.json: expected the keys config (pattern, default_vocab_size, "
            f"default_num_special_tokens) and vocab (rank, token_bytes); {type(error).__name__}: {error}"
        ) from None
    special = {index: named.get(index, f"<SPECIAL_{index}>") for index in range(reserved)}
    ids = {token: index for index, token in special.items()}
    roles = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
    tokens = SpecialTokens(special, **{role: ids.get(token) for role, token in roles.items()})
    return RankTokenizer(source, ranks, pattern, tokens, offset=reserved)
