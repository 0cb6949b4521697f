"""sentencepiece models, read by the sentencepiece library itself."""

from __future__ import annotations

from typing import Any

from kdflow.contracts import KdflowError
from kdflow.tokenizers.tokenizer import SpecialTokens, Tokenizer

SPACE = "▁"  # U+2581, how sentencepiece writes a space
SPACE_IS_AMBIGUOUS = "U+2581 to space"


class SentencepieceTokenizer(Tokenizer):
    """A tokenizer of the sentencepiece library."""

    def __init__(self, source: str, content: bytes) -> None:
        import sentencepiece

        try:
            model: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
            ids = range(model.get_piece_size())
        except RuntimeError:
            ids = range(0)
        if not ids:  # the library takes a file without a byte, and makes [] of every text
            raise KdflowError(
                f"{source} is neither a sentencepiece model nor a tiktoken file (lines of base64 and a rank); "
                "is it whole, or a pointer of Git LFS?"
            )
        if model.normalize("a").endswith(SPACE):
            raise KdflowError(
                f"{source} writes spaces behind words instead of before them (treat_whitespace_as_suffix); kdflow does "
                "not read such models"
            )
        self._model = model
        special = {index: model.id_to_piece(index) for index in ids if model.is_control(index)}
        roles = {
            role: index if index >= 0 else None
            for role, index in (("bos", model.bos_id()), ("eos", model.eos_id()), ("pad", model.pad_id()))
        }
        unk = model.unk_id()
        super().__init__(
            source,
            SpecialTokens({unk: model.id_to_piece(unk), **special}, unk=unk, **roles),
            normalizes=(*_normalizers(model), SPACE_IS_AMBIGUOUS),
            prefixes_space=model.normalize("a").startswith(SPACE),
        )

    def normalized(self, text: str) -> bytes:
        """What of a text reaches the splitting into tokens, without the space put before it."""
        found: str = self._model.normalize(text)
        if self.prefixes_space:
            found = found.removeprefix(SPACE)
        return found.replace(SPACE, " ").encode()

    def _encode(self, text: str) -> list[int]:
        return list(self._model.encode(text))

    def _spell(self) -> dict[int, bytes]:
        return {index: self._bytes(index) for index in range(self._model.get_piece_size())}

    def _bytes(self, index: int) -> bytes:
        if index in self.special.tokens:
            return b""
        piece = self._model.id_to_piece(index)
        return bytes([int(piece[3:-1], 16)]) if self._model.is_byte(index) else piece.replace(SPACE, " ").encode()


def _normalizers(model: Any) -> tuple[str, ...]:
    """What the model does to a text that tells its rules apart; their names are in no interface of the library."""
    probes = {"NFKC": "ﬁ", "NFC": "e\u0301", "lower case": "A", "runs of spaces to one": "a  b"}
    changed = [name for name, text in probes.items() if model.normalize(text).removeprefix(SPACE) != _written(text)]
    return tuple(name for name in changed if not (name == "NFC" and "NFKC" in changed))


def _written(text: str) -> str:
    return text.replace(" ", SPACE)
