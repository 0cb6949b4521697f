"""Small tokenizers of each kind, made on the spot from the repository's own text."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece

from tests.support.models import make_tokenizer, texts

PATTERN = r"\p{L}+| ?[^\s\p{L}]+|\s+"


def write_sentencepiece(path: Path, **settings: Any) -> Path:
    """A sentencepiece model with byte fallback, as Llama's and Mistral's are; ``settings`` change its training."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 0.999, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()), model_writer=model, **{**defaults, **settings}
    )
    path.write_bytes(model.getvalue())
    return path


def ranks() -> dict[bytes, int]:
    """Ranks of all bytes and some longer tokens."""
    merged = [b"th", b"he", b"the", b" t", b" the", b"\xe4\xbd", b"\xe4\xbd\xa0", b"  ", b"    "]
    return {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *merged])}


def write_ranks(path: Path) -> Path:
    """A tiktoken file."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks().items()]
    path.write_text("".join(lines))
    return path


def write_tekken(path: Path, **changes: Any) -> Path:
    """A tekken.json with 8 special tokens, which uses 260 of its 265 ranks."""
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in ranks().items()
    ]
    config = {"pattern": PATTERN, "default_vocab_size": 268, "default_num_special_tokens": 8, "version": "v3"}
    path.write_text(json.dumps({"config": config, "vocab": vocabulary, **changes}))
    return path


def write_tokenizer_json(folder: Path, **settings: Any) -> Path:
    """A Hugging Face directory with a byte-level tokenizer."""
    make_tokenizer(**settings).save_pretrained(folder)
    return folder
