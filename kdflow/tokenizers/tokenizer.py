"""One type for every tokenizer: text to ids, ids to the exact bytes that they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kdflow.contracts import KdflowError
from kdflow.tokenizers.spelling import Spelling, bounds_of


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that mark something about a text and are no part of it, by role.

    Attributes:
        tokens: all of them, ``{id: content}``, such as ``{2: "</s>"}``.
        bos: the id that begins a text; None where the tokenizer's files name none, and likewise below.
        eos: the id that ends a text.
        pad: the id that fills a batch up. May be another role's id too.
        unk: the id of what the vocabulary cannot spell.
    """

    tokens: Mapping[int, str] = field(default_factory=dict)
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None

    @property
    def roles(self) -> dict[str, int | None]:
        """``{"bos": id, "eos": id, "pad": id, "unk": id}``."""
        return {"bos": self.bos, "eos": self.eos, "pad": self.pad, "unk": self.unk}

    @property
    def others(self) -> dict[int, str]:
        """Those without a role."""
        return {index: token for index, token in self.tokens.items() if index not in self.roles.values()}


class _Arrays(NamedTuple):
    """A vocabulary as one text: its bytes, and for the id i in row i + 1 where its token begins and its length."""

    text: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Tokenizer(ABC):
    """A tokenizer, whatever library is behind it; :func:`kdflow.tokenizers.load` makes one.

    Attributes:
        source: where it was loaded from.
        special: its special tokens, by role.
        added: tokens that were added to the vocabulary as a whole and are a part of the text, ``{id: content}``, such
            as Qwen3's ``<think>``; as far as the files tell them apart.
        normalizes: what it changes in a text before it splits it, such as ``("NFC",)``; empty if nothing.
        prefixes_space: whether it puts a space of its own before a text, which is then no part of the text.
    """

    def __init__(
        self, source: str, special: SpecialTokens, *, added: Mapping[int, str] | None = None,
        normalizes: tuple[str, ...] = (), prefixes_space: bool = False,
    ) -> None:  # fmt: skip
        self.source, self.special, self.added = source, special, added or {}
        self.normalizes, self.prefixes_space = normalizes, prefixes_space

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {self.vocabulary_size} ids)"

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Nothing is put before or after it, and what looks like a special token is plain text.

        Added tokens that are not special, such as Qwen's ``<think>``, are found in the text: they are a part of it.

        Raises:
            KdflowError: the text cannot be written as UTF-8, or the library behind gives up on it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise KdflowError(
                f"a text holds half a surrogate pair, {text[error.start]!r} at character {error.start}, which is no "
                "Unicode text: repair it where it is read, such as with text.encode('utf-8', 'replace').decode()"
            ) from None
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, as far as their bytes are UTF-8; bytes that are not become U+FFFD.

        Raises:
            KdflowError: as :meth:`token_bytes`.
        """
        return b"".join(self.token_bytes(ids)).decode("utf-8", "replace")

    def token_bytes(self, ids: Iterable[int], *, at_start: bool = True) -> list[bytes]:
        """The bytes of text that each id stands for.

        Byte-level letters are bytes again, ``<0x0A>`` is the byte 10 and ``▁`` a space. A special token stands for no
        text, and so for ``b""``; an added token that is not special for its content. A character may be spread over
        several tokens, whose bytes alone are then no UTF-8.

        Args:
            ids: as of :meth:`encode`.
            at_start: whether they begin a text. If so, the space that sentencepiece puts before a text is left out, as
                every decoder does; ids from the middle of a text keep it.

        Returns:
            As many byte strings as ids; joined they are the text, but for what :func:`kdflow.tokenizers.roundtrip`
            tells.

        Raises:
            KdflowError: the vocabulary has no such id.
        """
        try:
            found = list(map(self._table.__getitem__, ids))
        except KeyError as error:
            raise KdflowError(
                f"id {error.args[0]} is no token of {self.source}, whose ids are 0 to {self.vocabulary_size - 1}"
                f"{self._gaps}; rows of a model's embedding beyond its tokenizer are padding"
            ) from None
        if at_start and self.prefixes_space:
            first = next((at for at, token in enumerate(found) if token), None)
            if first is not None and found[first].startswith(b" "):
                found[first] = found[first][1:]
        return found

    def spelling(self, ids: Sequence[int] | np.ndarray) -> Spelling:
        """What :meth:`token_bytes` gives for the ids of a whole text, without an object for each.

        Raises:
            KdflowError: the vocabulary has no such id.
        """
        rows = np.fromiter(ids, np.int64, len(ids)) + 1
        lengths = self._arrays.lengths.take(rows, mode="clip")
        if lengths.min(initial=0) < 0:
            self.token_bytes(map(int, ids))  # which tells the id that is none
        bounds = bounds_of(lengths)
        at = (self._arrays.starts.take(rows) - bounds[:-1]).repeat(lengths)
        at += np.arange(len(at))
        text = self._arrays.text.take(at).tobytes()
        if self.prefixes_space and text.startswith(b" "):
            return Spelling(text[1:], np.maximum(bounds - 1, 0))
        return Spelling(text, bounds)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id: ids may have gaps, and models often have more rows, as padding."""
        return max(self._table) + 1

    @property
    def vocabulary(self) -> Mapping[int, bytes]:
        """The bytes of every id that is a token."""
        return self._table

    @cached_property
    def missing_bytes(self) -> bytes:
        """The byte values that no token spells, in order: text that needs them loses them, or becomes unknown."""
        spelt = {token[0] for token in self._table.values() if len(token) == 1}
        return bytes(value for value in range(256) if value not in spelt)

    @property
    def _gaps(self) -> str:
        gaps = self.vocabulary_size - len(self._table)
        return f" but for {gaps} gaps" if gaps else ""

    @cached_property
    def _table(self) -> dict[int, bytes]:
        table = self._spell()
        if not table:
            raise KdflowError(f"{self.source} holds no vocabulary; give the file or directory of a whole tokenizer")
        return table

    @cached_property
    def _arrays(self) -> _Arrays:
        # An id that is none has a length below 0: rows before the first and after the last id, and the gaps.
        tokens = [self._table.get(index) for index in range(-1, self.vocabulary_size + 1)]
        lengths = np.array([-1 if token is None else len(token) for token in tokens])
        text = b"".join(token for token in tokens if token is not None)
        return _Arrays(np.frombuffer(text, np.uint8), bounds_of(np.maximum(lengths, 0))[:-1], lengths)

    @abstractmethod
    def normalized(self, text: str) -> bytes:
        """What of a text reaches the splitting into tokens, without the space of :attr:`prefixes_space`."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """As :meth:`encode`, of text that is UTF-8."""

    @abstractmethod
    def _spell(self) -> dict[int, bytes]:
        """The bytes of every id."""
