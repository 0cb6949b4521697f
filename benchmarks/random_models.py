"""Models of Qwen3's shapes with random weights, and a tokenizer for them: nothing is fetched."""

from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import Any

import torch

VOCAB, TINY_VOCAB = 151936, 2048
END = "<|end|>"
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "8B": {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "14B": {
        "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 17408,
        "tie_word_embeddings": False,
    },
    # For a CPU.
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": TINY_VOCAB,
    },
    "tiny-wide": {
        "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": TINY_VOCAB,
    },
}  # fmt: skip


def vocabulary_size(shape: str) -> int:
    """Tokens of a shape's tokenizer, which are rows of its head."""
    return int(SHAPES[shape].get("vocab_size", VOCAB))


def words(vocab: int = VOCAB) -> list[str]:
    """As many words as make ``vocab`` tokens with 256 bytes and an end; each but its last letter is one."""
    counts = itertools.chain.from_iterable(itertools.product(string.ascii_letters, repeat=n) for n in (1, 2, 3, 4))
    return ["".join(letters) for letters in itertools.islice(counts, vocab - 257)]


def write_tokenizer(directory: Path, vocab: int = VOCAB) -> None:
    """Byte-level pairs: every word with a space before it is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ" + word[:-1], word[-1]) for word in words(vocab)]
    names = [END, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(directory)


def make_config(directory: Path, shape: str, vocab: int | None = None) -> Any:
    """The config of a shape, in ``directory``: enough to plan with. Another vocabulary takes the place of its own."""
    from transformers import Qwen3Config

    sizes: dict[str, Any] = {
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCAB, "tie_word_embeddings": True, **SHAPES[shape],
        **({} if vocab is None else {"vocab_size": vocab}),
    }  # fmt: skip
    config: Any = Qwen3Config(
        eos_token_id=0, bos_token_id=None, max_position_embeddings=40960, dtype=torch.bfloat16,
        architectures=["Qwen3ForCausalLM"], **sizes,
    )  # fmt: skip
    config.save_pretrained(directory)
    return config


def make_model(directory: Path, shape: str, seed: int = 0, vocab: int | None = None) -> None:
    """A model with its tokenizer in bf16, unless it is there."""
    from transformers import Qwen3ForCausalLM

    if list(directory.glob("*.safetensors")):
        return
    config = make_config(directory, shape, vocab)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    write_tokenizer(directory, config.vocab_size)
    model.save_pretrained(directory)
    if torch.cuda.is_available():  # room for the processes that this one starts
        del model
        torch.cuda.empty_cache()
