"""From the GGUF file of a known model to a Hugging Face directory, with what the format loses put back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def convert_smollm2(gguf: Path, folder: Path, model_id: str) -> None:
    """Write SmolLM2, with its pre-tokenizer and its rotary base."""
    from tokenizers import pre_tokenizers

    model, tokenizer = _read(gguf)
    # The reader does not know the pre-tokenizer that the file names, "smollm": single digits are split off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    _write(model, tokenizer, folder, model_id)
    # Readers older than transformers 5 look for the rotary base here, and take 10,000 without a word if it is not.
    _edit(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])
    _edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def convert_gemma3(gguf: Path, folder: Path, model_id: str) -> None:
    """Write Gemma 3, with its way to cut runs of whitespace.

    Its own tokenizer makes the merges of such runs first, the longest run first, and has each run of 2 to 31 spaces
    as an added token; the file has the merges in another order, and no such tokens.
    """
    model, tokenizer = _read(gguf)
    _write(model, tokenizer, folder, model_id)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]

    def order(merge: list[str]) -> int:
        run = "".join(merge)
        return -len(run) if set(run) in ({"\n"}, {"▁"}, {"\t"}) else 0

    merges.sort(key=order)  # stable: all others stay as they are, behind
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [
        {"id": vocabulary[run], "content": run, **plain} for run in map("▁".__mul__, range(2, 32))
    ]
    content["added_tokens"].sort(key=lambda token: token["id"])
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def _read(gguf: Path) -> tuple[Any, Any]:
    """The model in bfloat16, as if it had never been quantised, and its tokenizer as the GGUF reader makes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = model.to(torch.bfloat16)
    # The weights are plain now; while they are said to be quantised, saving is refused, and so would be training.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _write(model: Any, tokenizer: Any, folder: Path, model_id: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for its owner alone, and a cache may be shared
        shutil.copymode(folder / "config.json", file)
    _edit(folder / "config.json", _model_name_or_path=model_id)


def _edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
