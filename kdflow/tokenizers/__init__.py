"""Real tokenizers as byte strings, vocabulary overlap, aligners."""

from __future__ import annotations

from kdflow.tokenizers.huggingface import from_transformers
from kdflow.tokenizers.loading import load
from kdflow.tokenizers.round_trip import RoundTrip, roundtrip
from kdflow.tokenizers.tokenizer import SpecialTokens, Tokenizer
from kdflow.tokenizers.vocabulary import VocabularyComparison, compare_vocabularies

__all__ = [
    "RoundTrip",
    "SpecialTokens",
    "Tokenizer",
    "VocabularyComparison",
    "compare_vocabularies",
    "from_transformers",
    "load",
    "roundtrip",
]
