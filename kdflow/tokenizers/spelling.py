"""The tokens of a text as two arrays: no object for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np


class Spelling(Sequence[bytes]):
    """Tokens as the bytes that they stand for: a text, and where it is cut.

    A sequence like any other to who reads it so; its members are made when the first is asked for.

    Attributes:
        text: the bytes of all tokens.
        bounds: int64 ``[n + 1]``, from 0 on: token i is ``text[bounds[i]:bounds[i + 1]]``.
    """

    def __init__(self, text: bytes, bounds: np.ndarray) -> None:
        self.text, self.bounds = text, bounds

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> Spelling:
        """The spelling of tokens, which may be one already."""
        if isinstance(tokens, Spelling):
            return tokens
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        return cls(b"".join(tokens), bounds_of(lengths))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        return self._tokens[at]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._tokens == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}.of({self._tokens!r})"

    @cached_property
    def _tokens(self) -> list[bytes]:
        return [self.text[start:stop] for start, stop in itertools.pairwise(self.bounds.tolist())]


def bounds_of(lengths: np.ndarray) -> np.ndarray:
    """Where tokens of these numbers of bytes begin, and the last one ends, int64 ``[n + 1]``."""
    bounds = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=bounds[1:])
    return bounds
