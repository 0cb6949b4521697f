"""Where adapters go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kdflow.config import LoraConfig, StudentConfig
from kdflow.contracts import KdflowError
from kdflow.models.loading import load_model
from kdflow.models.lora import add_adapters, identity
from tests.support.models import as_pickles, make_model

Load = Callable[[str], Any]


@pytest.fixture
def load(tiny: dict[str, str]) -> Load:
    return lambda which: load_model(tiny[which], torch.float32, torch.device("cpu"))


def _adapted(model: Any, **options: Any) -> set[str]:
    """The modules that got adapters, and nothing else that could be trained."""
    add_adapters(model, LoraConfig(**options), torch.float32)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modules = {name.partition(".lora_")[0] for name in trained}
    assert trained == {f"{name}.lora_{side}.default.weight" for name in modules for side in "AB"}
    return modules


@pytest.mark.parametrize("which", ["student", "untied"])
def test_all_linear_layers_of_the_blocks_and_not_the_head(load: Load, which: str) -> None:
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert _adapted(load(which)) == {
        f"model.layers.{layer}.{part}.{name}"
        for layer in range(2)
        for part, names in (("self_attn", attention), ("mlp", mlp))
        for name in names
    }


def test_chosen_layers(load: Load) -> None:
    assert _adapted(load("student"), targets=["v_proj", "layers.1.mlp.up_proj"]) == {
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip


def test_linear_layers_that_are_written_as_convolutions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    assert _adapted(model) == {
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_adapters_begin_by_changing_nothing(load: Load) -> None:
    ids = torch.arange(40)[None]
    model = load("student")
    before = model(input_ids=ids).logits
    _adapted(model, rank=3)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "is the LM head of the student"),
        ("embed_tokens", "is the embeddings of the student"),
        ("q_porj", "is no module of the student; did you mean 'q_proj'?"),
        ("self_attn", "is a LlamaAttention, which is no linear layer"),
        ("norm", "is a LlamaRMSNorm, which is no linear layer"),
    ],
)
def test_targets_that_cannot_have_adapters(load: Load, target: str, message: str) -> None:
    with pytest.raises(KdflowError) as caught:
        _adapted(load("untied"), targets=["q_proj", target])
    assert str(caught.value).startswith(f"student.lora.targets: '{target}' {message}")
    assert "choose among down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_adapters_are_known_by_the_weights_and_the_config_of_their_base(tmp_path: Path) -> None:
    same, other = (make_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    again = make_model(tmp_path / "again", seed=0)

    def found() -> list[dict[str, Any] | None]:
        return [identity(StudentConfig(model=model, lora=LoraConfig())) for model in (same, again, other)]

    one, two, three = found()
    assert one == two != three
    for model in (same, again, other):
        as_pickles(Path(model))
    one, two, three = found()
    assert one == two != three
    config = Path(again) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.1}))
    one, two, _ = found()
    assert one != two
    assert one != identity(StudentConfig(model=same, lora=LoraConfig(alpha=1)))
    assert one == identity(StudentConfig(model=same, lora=LoraConfig(dropout=0.5)))
    assert identity(StudentConfig(model=same)) is None
