"""Small Hugging Face models and tokenizers, made on the spot: real architectures, random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
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
        tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|im_end|>",
        chat_template=template,
    )  # fmt: skip


def make_foreign_tokenizer(
    vocab_size: int = 300, template: str | None = None, nfc: bool = False
) -> PreTrainedTokenizerFast:
    """In the manner of sentencepiece: ▁ for a space and one before a text, bytes where no piece fits, <s> first."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, limit_alphabet=60)
    trained.train_from_iterator(texts(), trainer)
    made = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made["vocab"]]
    merges = [tuple(merge) for merge in made["merges"]]
    tokenizer = Tokenizer(models.BPE(
        {name: at for at, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    ))  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.NFC()] if nfc else []), *trained.normalizer])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def as_pickles(directory: Path) -> None:
    """The weights of a saved model as torch.save writes them, in two shards with their index."""
    file = directory / "model.safetensors"
    weights, names = load_file(file), {}
    for number, part in enumerate((list(weights)[::2], list(weights)[1::2]), start=1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, directory / shard)
        names |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": file.stat().st_size}, "weight_map": names}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    file.unlink()


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
