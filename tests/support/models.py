"""Small Hugging Face models and tokenizers, made on the spot: real architectures, random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = Path(__file__).parents[2] / "examples" / "data" / "eval.jsonl"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts() -> list[str]:
    """The repository's own held-out text, line by line."""
    return [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]


def make_tokenizer(vocab_size: int = 384, corpus: Iterable[str] | None = None, template: str | None = TEMPLATE,
                   bos: bool = False) -> PreTrainedTokenizerFast:  # fmt: skip
    """A byte-level BPE tokenizer with a ChatML template, trained on ``corpus``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(corpus if corpus is not None else texts(), trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|im_end|>",
        chat_template=template,
    )  # fmt: skip


def make_model(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    tied: bool = True,
    padding: int = 0,
    seed: int = 0,
    tokenizer: Any = None,
    scale: float = 4.0,
) -> str:
    """A random Llama with its tokenizer in ``directory``; ``padding`` rows of its vocabulary are no tokens.

    ``scale`` multiplies the embeddings, so that random models disagree with one another clearly.
    """
    tokenizer = tokenizer if tokenizer is not None else make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padding, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def rename_token(model: str, directory: Path, old: str, new: str) -> str:
    """A copy of a model in which a special token has another name, its chat template included."""
    shutil.copytree(model, directory)
    for file in (*directory.glob("*.json"), *directory.glob("*.jinja")):
        file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return str(directory)


def write_jsonl(path: Path, records: Sequence[Any]) -> str:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)
