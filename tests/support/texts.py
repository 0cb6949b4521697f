"""Texts that make tokenizers fail: 200 written by hand, and drawn ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

MIXED = Path(__file__).parents[1] / "tokenizers" / "mixed.jsonl"
FRAGMENTS = [
    " ", "   ", "▁", "▁▁", "\n", "\r\n", "\t", "\0", "\u0004", "\u0085", "\u2028", "e\u0301", "é", "\u1112\u1161\u11ab",
    "ﬁ", "Ġ", "Ċ", "Ã©", "<s>", "</s>", "<unk>", "<0x0A>", "<|im_end|>", "<|endoftext|>", "<bos>", "[INST]", "<think>",
    "1234567", "👩‍👩‍👧", "🏳️‍🌈", "中文", "ｆｕｌｌ", "\U000e0041", "\U0004ffff",
     "\uffff", "don't", "I'LL", "ß", "İ", "//",
]  # fmt: skip


@cache
def mixed() -> tuple[dict[str, str], ...]:
    """Objects with ``id``, ``kind`` and ``text``: scripts, emoji, NFC and NFD, code, digits, spaces, control codes."""
    with MIXED.open(encoding="utf-8", newline="\n") as lines:
        return tuple(json.loads(line) for line in lines)


def drawn() -> st.SearchStrategy[str]:
    """Any Unicode text without half surrogate pairs, rich in what tokenizers treat specially."""
    return st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6)), max_size=12).map("".join)
