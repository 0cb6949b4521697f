"""A run that any plugin can be tried in: models and text made on the spot, seconds on a CPU, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_run(directory: Path, **sections: Any) -> dict[str, Any]:
    """A run file over a random Llama that learns sums from another one: 4 steps, in fp32, evaluated on held-out sums.

    Args:
        directory: where models, text and, in ``run``, the run directory are put.
        sections: what replaces parts of the run file: ``training={"steps": 2}`` changes one key of a section,
            ``tracking=["console", {"name": "mine"}]`` a whole value.

    Returns:
        What :func:`kdflow.train` takes.
    """
    tokenizer = _tokenizer()
    for seed, (name, layers) in enumerate({"student": 1, "teacher": 2}.items()):
        if not (directory / name).exists():
            _save_model(directory / name, layers, seed, tokenizer)
    sums = [{"prompt": f"{a} + {b} = ", "response": f"{a + b}, as everybody knows"} for a in range(9) for b in range(9)]
    for name, records in (("train", sums[8:]), ("eval", sums[:8])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    run: dict[str, Any] = {
        "student": {"model": str(directory / "student")},
        "teacher": {"model": str(directory / "teacher")},
        "algorithm": {"name": "forward_kl"},
        "data": {
            "train": [{"path": str(directory / "train.jsonl"), "format": "prompt_response"}],
            "eval": [{"path": str(directory / "eval.jsonl"), "format": "prompt_response"}],
            "max_length": 64,
            "max_tokens": 256,
        },
        "training": {"steps": 4, "tokens_per_step": 256, "learning_rate": 1e-2, "dtype": "float32"},
        "tracking": ["jsonl"],
        "output": str(directory / "run"),
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(run.get(name), dict)
        run[name] = {**run[name], **section} if both else section
    return run


def _tokenizer() -> Any:
    """A token a byte, and an end of the text."""
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def _save_model(directory: Path, layers: int, seed: int, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
