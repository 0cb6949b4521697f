"""Whether the bytes of its tokens give a text back, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdflow.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class RoundTrip:
    """A text's way through a tokenizer and back.

    Attributes:
        text: the text.
        ids: its tokens.
        found: what the tokens' bytes join to.
        reasons: why that is not the text, in words, by kind; empty if it is. ``normalization``: the tokenizer changes
            the text before it splits it. ``missing bytes``: the vocabulary cannot spell some bytes, and they are gone.
            ``unknown token``: it cannot spell some characters, and an <unk> stands there. ``unexplained``: there is a
            difference beyond these.
    """

    text: str
    ids: list[int]
    found: bytes
    reasons: Mapping[str, str]

    @property
    def exact(self) -> bool:
        """Whether the text came back, byte by byte."""
        return self.found == self.text.encode()


def roundtrip(tokenizer: Tokenizer, text: str) -> RoundTrip:
    """Encode a text, join its tokens' bytes, and tell what differs and why.

    Each reason is checked: ``normalization`` compares with what the tokenizer makes of the text before it splits it,
    and ``missing bytes`` explains a difference only if the text without these bytes is exactly what came back.

    Raises:
        KdflowError: as :meth:`Tokenizer.encode`.
    """
    ids = tokenizer.encode(text)
    found = b"".join(tokenizer.token_bytes(ids))
    reasons: dict[str, str] = {}
    wanted = text.encode()
    if found != wanted:
        split = tokenizer.normalized(text)
        if split != wanted:
            rules = ", ".join(tokenizer.normalizes) or "its pre-tokenizer"
            reasons["normalization"] = f"the text is changed by {rules}: {_difference(wanted, split)}"
        reasons |= _losses(tokenizer, ids, split, found)
    return RoundTrip(text, ids, found, reasons)


def _losses(tokenizer: Tokenizer, ids: list[int], split: bytes, found: bytes) -> dict[str, str]:
    """What happened between the bytes that were split and those of the tokens."""
    if found == split:
        return {}
    unknown = ids.count(tokenizer.special.unk) if tokenizer.special.unk is not None else 0
    lost = bytes(byte for byte in split if byte in tokenizer.missing_bytes)
    if unknown and _is_within(found, split):
        return {"unknown token": f"{unknown} tokens are {tokenizer.special.tokens[tokenizer.special.unk or 0]}, which "
                                 f"stands for no bytes: {_difference(split, found)}"}  # fmt: skip
    if lost and found == bytes(byte for byte in split if byte not in tokenizer.missing_bytes):
        return {"missing bytes": f"no token spells {' '.join(f'0x{byte:02X}' for byte in sorted(set(lost)))}; "
                                 f"{len(lost)} bytes are gone"}  # fmt: skip
    return {"unexplained": _difference(split, found)}


def _is_within(part: bytes, whole: bytes) -> bool:
    """Whether the bytes of ``part`` stand in ``whole`` in this order."""
    rest = iter(whole)
    return all(byte in rest for byte in part)


def _difference(before: bytes, after: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    return f"at byte {at}, {before[at : at + 12]!r} became {after[at : at + 12]!r}"
