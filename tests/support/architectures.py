"""Tiny random models of many architectures; window, soft-cap and scale are small enough to matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kdflow.models.attention import PACKED

VOCABULARY, WINDOW = 97, 5
_ALTERNATING = ["sliding_attention", "full_attention"]
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip

CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "llama-tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _COMMON),
    "qwen3-moe": ("qwen3_moe", {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "glm4-moe": ("glm4_moe", {**_COMMON, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                              "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}),
    "mistral": ("mistral", {**_COMMON, "sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_COMMON, "tie_word_embeddings": True, "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**_COMMON, "tie_word_embeddings": True, "num_hidden_layers": 4, "sliding_window": WINDOW,
                               "layer_types": _ALTERNATING * 2}),
    "gpt-oss": ("gpt_oss", {**_COMMON, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "num_local_experts": 4,
                            "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", _GPT),
    "cohere": ("cohere", {**_COMMON, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**_COMMON, "logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    "granite": ("granite", {**_COMMON, "logits_scaling": 4.0}),
    "phi": ("phi", {**_COMMON, "num_key_value_heads": 4}),
    "smollm3": ("smollm3", {**_COMMON, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    # Those below let packed samples see each other.
    "mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "stablelm": ("stablelm", _COMMON),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
}  # fmt: skip


def make_config(name: str, **changes: Any) -> PreTrainedConfig:
    kind, options = CONFIGS[name]
    return CONFIG_MAPPING[kind](**{**options, **changes})


def make_architecture(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model whose weights are large enough for attention to be uneven and for logits to be apart."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(name, **changes), attn_implementation=PACKED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))  # biases, norms, sinks: zero or one when fresh
    return model.to(dtype).train(False)
