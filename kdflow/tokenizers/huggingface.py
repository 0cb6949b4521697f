"""Tokenizers of the tokenizers library: a tokenizer.json, alone or inside a Hugging Face directory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from kdflow.contracts import KdflowError
from kdflow.tokenizers.sentencepiece_model import SPACE, SPACE_IS_AMBIGUOUS
from kdflow.tokenizers.tokenizer import SpecialTokens, Tokenizer

_BYTE = re.compile("<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[int, int]:
    """The printable letters that GPT-2 writes bytes in, each with its byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + at: byte for at, byte in enumerate(others)}


# Of what is no such letter, one that no byte is.
_LETTERS = {**dict.fromkeys(range(256), 0xFFFF), **_byte_letters()}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library.

    Args:
        source: where it was loaded from.
        backend: a ``tokenizers.Tokenizer``.
        special: its special tokens, by role.
        owner: the transformers tokenizer that holds the backend, and sets it up anew with every call of its own.
    """

    def __init__(self, source: str, backend: Any, special: SpecialTokens, owner: Any = None) -> None:
        self._backend, self._owner = backend, owner
        steps = list(_steps(backend.decoder, "decoders"))
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._metaspace = "Metaspace" in kinds or any(_replaces(step, SPACE, " ") for step in steps)
        self._byte_fallback = "ByteFallback" in kinds
        if odd := [step for step in steps if not _is_known(step)]:
            raise KdflowError(
                f"{source}: what its tokens stand for is not known, since its decoder has the step "
                f"{json.dumps(odd[0], ensure_ascii=False)}; kdflow reads byte-level tokenizers, as GPT-2's, and those "
                "in the manner of sentencepiece"
            )
        normalizes = [_describe(step) for step in _steps(backend.normalizer, "normalizers") if not _escapes(step)]
        if any(step.get("add_prefix_space") for step in _steps(backend.pre_tokenizer, "pretokenizers")):
            normalizes.append("a space before the text")
        if self._metaspace:
            normalizes.append(SPACE_IS_AMBIGUOUS)
        known = backend.get_added_tokens_decoder().items()
        added = {index: self._plain(token.content) for index, token in known if index not in special.tokens}
        super().__init__(
            source, special, added=added, normalizes=tuple(normalizes), prefixes_space=any(map(_strips, steps))
        )

    def normalized(self, text: str) -> bytes:
        """What of a text reaches the splitting into tokens, without the space of ``prefixes_space``."""
        backend = self._backend
        whole = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = [whole]
        if backend.pre_tokenizer:
            pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(whole)]
        found = b"".join(map(self._written, pieces))
        return found.removeprefix(b" ") if self.prefixes_space else found

    def _encode(self, text: str) -> list[int]:
        if self._owner is not None:
            return list(self._owner.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _spell(self) -> dict[int, bytes]:
        table = {index: self._token(token) for token, index in self._backend.get_vocab(with_added_tokens=False).items()}
        # What cannot be spelled becomes <unk>; and a unigram model also finds special tokens in a text, as its pieces.
        never = {self.special.unk}
        if type(self._backend.model).__name__ == "Unigram":
            never |= {index for index, token in self._backend.get_added_tokens_decoder().items() if token.special}
        for index, content in {**self.added, **self.special.tokens}.items():
            # An ordinary token that was given a role, such as padding with "!", is still what "!" in a text becomes.
            is_text = index in self.added or (index not in never and self._encode(content) == [index])
            table[index] = self._plain(content).encode() if is_text else b""
        return table

    def _token(self, token: str) -> bytes:
        if self._byte_fallback and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self._written(token)

    def _written(self, piece: str) -> bytes:
        """The bytes of a piece as the vocabulary writes it."""
        if self._byte_level:
            try:
                return piece.translate(_LETTERS).encode("latin-1")
            except UnicodeEncodeError:  # written plainly, as special tokens are
                return piece.encode()
        return self._plain(piece).encode()

    def _plain(self, piece: str) -> str:
        return piece.replace(SPACE, " ") if self._metaspace else piece


def from_file(source: str, content: bytes) -> HuggingFaceTokenizer:
    """A tokenizer.json alone. It names no roles but <unk>, and what its template puts before and after a text.

    Raises:
        KdflowError: it is none.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise KdflowError(f"{source} is no tokenizer.json of the tokenizers library: {error}") from None
    padding = backend.padding or {}
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    added = {index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.special}
    before, after = _template(backend)
    model = json.loads(content)["model"]
    unk = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    special = SpecialTokens(
        added, bos=before, eos=after, pad=padding.get("pad_id"),
        unk=backend.token_to_id(unk) if unk is not None else None,
    )  # fmt: skip
    return HuggingFaceTokenizer(source, backend, _with_roles(special, backend))


def from_transformers(tokenizer: Any) -> HuggingFaceTokenizer:
    """A tokenizer that transformers has loaded; it stays in use, and gives the same ids here.

    Raises:
        KdflowError: it has no backend of the tokenizers library, so that its tokens' bytes are not known.
    """
    source = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise KdflowError(
            f"{source}: a {type(tokenizer).__name__} has no backend of the tokenizers library; "
            "kdflow.tokenizers.load reads its sentencepiece or tiktoken file itself: give the path of that file"
        )
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
    return HuggingFaceTokenizer(source, backend, _with_roles(SpecialTokens(added, **roles), backend), owner=tokenizer)


def _with_roles(special: SpecialTokens, backend: Any) -> SpecialTokens:
    """The same, in which tokens with a role are special whether they were added as such or not."""
    named = {index: backend.id_to_token(index) for index in special.roles.values() if index is not None}
    return SpecialTokens({**named, **special.tokens}, **special.roles)


def _template(backend: Any) -> tuple[int | None, int | None]:
    """The special tokens that the backend puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    ids = backend.encode("a", add_special_tokens=True).ids
    if not bare or bare[0] not in ids:
        return None, None
    start = ids.index(bare[0])
    return next(iter(ids[:start]), None), next(iter(ids[start + len(bare) :]), None)


def _steps(component: Any, parts: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, as a tokenizer.json writes them."""
    # What is pickled of a component is its part of a tokenizer.json; the whole, with the vocabulary, takes a second.
    return list(_flat(json.loads(component.__getstate__()), parts)) if component is not None else []


def _flat(rule: dict[str, Any], parts: str) -> Iterator[dict[str, Any]]:
    if rule["type"] == "Sequence":
        for part in rule[parts]:
            yield from _flat(part, parts)
    else:
        yield rule


def _is_known(step: dict[str, Any]) -> bool:
    """Whether a step of a decoder is one of those whose effect on bytes is known."""
    if step["type"] in ("Replace", "Strip"):
        return _replaces(step, SPACE, " ") or _strips(step)
    return step["type"] in ("ByteLevel", "Metaspace", "ByteFallback", "Fuse")


def _replaces(step: dict[str, Any], old: str, new: str) -> bool:
    return step["type"] == "Replace" and bool((step["pattern"], step["content"]) == ({"String": old}, new))


def _escapes(step: dict[str, Any]) -> bool:
    """Whether a normalizer only writes spaces as sentencepiece does."""
    return _replaces(step, " ", SPACE) or (step["type"] == "Prepend" and step["prepend"] == SPACE)


def _strips(step: dict[str, Any]) -> bool:
    """Whether a decoder takes a space away from the start of a text."""
    if step["type"] == "Metaspace":
        return bool(step["prepend_scheme"] != "never")
    return step["type"] == "Strip" and bool((step["content"], step["start"], step["stop"]) == (" ", 1, 0))


def _describe(step: dict[str, Any]) -> str:
    if step["type"] == "Replace":
        return f"{next(iter(step['pattern'].values()))!r} to {step['content']!r}"
    return str(step["type"])
