"""What tiktoken files leave out: split patterns and special tokens, which their families keep in code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """How the ranks of a file are used.

    Attributes:
        pattern: the regular expression by which text is split before its bytes are merged.
        special: special tokens; their ids follow those of the ranks.
        added: added tokens that are a part of a text; their ids come after.
        roles: ``{"bos": token, …}``, as far as the family has them.
        nfc: whether text is normalized to NFC first.
    """

    pattern: str
    special: Sequence[str] = ()
    added: Sequence[str] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    nfc: bool = False


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_NAMED = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    # qwen.tiktoken of Qwen2, 2.5 and 3 (the last adds four tokens); github.com/QwenLM, tokenization_qwen.py.
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": Family(
        pattern=_WORDS % r"\p{N}",
        special=(
            "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
            "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
        ),
        added=(
            "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
            "<|repo_name|>", "<|file_sep|>",
        ),
        roles={"eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        nfc=True,
    ),
    # tokenizer.model of Llama 3, 3.1, 3.2 and 3.3; llama-models 0.3.0, llama3/tokenizer.py.
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Family(
        pattern=_WORDS % r"\p{N}{1,3}",
        special=(*_LLAMA3_NAMED, *(f"<|reserved_special_token_{index}|>" for index in range(2, 246))),
        roles={"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|finetune_right_pad_id|>"},
    ),
}  # fmt: skip
"""Families by the SHA-256 of their file."""

TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The special tokens of a tekken.json that lists none (mistral-common 1.13.1, tekken.py)."""
