"""The LM head as it is read from models, against the models' own logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdflow.contracts import Head, KdflowError
from kdflow.models import head as module
from kdflow.models.head import HeadAndEmbeddings, hidden_states, probe_head, read_head
from kdflow.models.loading import load_model
from tests.support.architectures import VOCABULARY, make_architecture

# What each head has besides its weight.
HEADS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "gemma2": {"softcap": 3.0},
    "gemma3": {},
    "cohere": {"scale": 0.25},
    "cohere2": {"scale": 0.25},
    "granite": {"scale": 0.25},
    "gpt2": {},
    "phi": {"bias": True},
    "gpt-oss": {},
}
IDS = torch.tensor([5, 96, 0, 31, 8, 8, 60])


def load(model: str, dtype: torch.dtype = torch.float32) -> HeadAndEmbeddings:
    return HeadAndEmbeddings(model, dtype, torch.device("cpu"))


def own_logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(input_ids=IDS[None], use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_logits_are_the_models_own(name: str) -> None:
    model = make_architecture(name)
    head = read_head(model)
    torch.testing.assert_close(head.logits(hidden_states(model, IDS)), own_logits(model), rtol=1e-5, atol=1e-5)
    assert head.vocab_size == VOCABULARY
    assert head.weight is model.get_output_embeddings().weight
    found = {"scale": head.scale, "softcap": head.softcap, "bias": head.bias is not None}
    assert found == {"scale": 1.0, "softcap": None, "bias": False, **HEADS[name]}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma2"])
def test_a_tied_head_is_the_embeddings(name: str) -> None:
    model = make_architecture(name)
    assert read_head(model).weight is model.get_input_embeddings().weight


def test_the_head_is_the_models_own_and_follows_it() -> None:
    model = make_architecture("phi")
    head = read_head(model)
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(7.0)
    assert head.bias is not None
    assert (head.bias == 7.0).all()


def test_ids_that_are_no_tokens_have_no_probability() -> None:
    model = make_architecture("llama")
    logits = read_head(model, valid_vocab=90).logits(hidden_states(model, IDS))
    assert torch.isneginf(logits[:, 90:]).all()
    assert torch.isfinite(logits[:, :90]).all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_passes_heads_as_they_are(name: str, dtype: torch.dtype) -> None:
    probe_head(make_architecture(name, dtype=dtype), "student")


ALTERED = {
    "softcap dropped": ("gemma2", {"softcap": None}),
    "softcap added": ("llama", {"softcap": 3.0}),
    "scale dropped": ("cohere", {"scale": 1.0}),
    "scale upside down": ("granite", {"scale": 4.0}),
    "scale off by a little": ("cohere2", {"scale": 0.26}),
    "bias dropped": ("phi", {"bias": None}),
    "another weight": ("llama", {"weight": torch.randn(VOCABULARY, 32)}),
}


@pytest.mark.parametrize(("name", "changes"), ALTERED.values(), ids=ALTERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_refuses_an_altered_head(
    name: str, changes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in changes.items()}

    def altered(model: PreTrainedModel, valid_vocab: int | None = None) -> Head:
        return dataclasses.replace(read_head(model, valid_vocab), **changes)

    monkeypatch.setattr(module, "read_head", altered)
    with pytest.raises(KdflowError, match=r"logits of the teacher .* cannot be recomputed from its hidden states"):
        probe_head(make_architecture(name, dtype=dtype), "teacher")


def test_the_probe_refuses_a_config_that_tells_another_scale_than_the_model_uses() -> None:
    model = make_architecture("cohere")
    model.config.logit_scale = 0.5
    with pytest.raises(KdflowError, match="cannot be recomputed"):
        probe_head(model, "student")


def test_the_probe_refuses_a_head_that_does_more() -> None:
    model = make_architecture("llama")
    model.get_output_embeddings().register_forward_hook(lambda _, args, logits: logits.relu())
    with pytest.raises(KdflowError, match="Its head does more than weight, bias, scale and soft-capping"):
        probe_head(model, "student")


def test_the_probe_refuses_logits_that_are_not_finite() -> None:
    model = make_architecture("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(KdflowError, match="relative difference nan"):
        probe_head(model, "student")


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_is_free_of_dropout_and_leaves_the_mode_as_it_was(training: bool) -> None:
    model = make_architecture("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train(training)
    probe_head(model, "student")
    assert model.training == training
    assert all(child.training == training for child in model.modules())


def test_a_model_without_a_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_architecture("llama")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.raises(KdflowError, match="LlamaForCausalLM has no LM head"):
        read_head(model)


def test_the_probe_sees_no_gradient() -> None:
    model = make_architecture("llama")
    probe_head(model, "student")
    assert all(parameter.grad is None for parameter in nn.Module.parameters(model))


@pytest.mark.parametrize("name", HEADS)
def test_the_head_alone_is_that_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = make_architecture(name)
    model.save_pretrained(tmp_path)
    whole, alone = read_head(model), load(str(tmp_path)).head
    assert torch.equal(alone.weight, whole.weight)
    assert (alone.bias is None) == (whole.bias is None)
    assert alone.bias is None or (whole.bias is not None and torch.equal(alone.bias, whole.bias))
    assert (alone.scale, alone.softcap) == (whole.scale, whole.softcap)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_embeddings_alone_are_those_of_the_whole_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make_architecture(name).save_pretrained(tmp_path)
    whole, alone, ids = (
        load_model(str(tmp_path), dtype, torch.device("cpu")),
        load(str(tmp_path), dtype),
        torch.arange(97),
    )
    tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
    embeddings = alone.load_embeddings()
    assert torch.equal(embeddings(ids), whole.get_input_embeddings()(ids))
    assert (embeddings.weight is alone.head.weight) == tied
    assert torch.equal(alone.head.weight, whole.get_output_embeddings().weight)
    assert embeddings.weight.dtype == dtype


def test_embeddings_are_scaled_as_the_model_scales_them(tmp_path: Path) -> None:
    make_architecture("gemma3").save_pretrained(tmp_path)
    embeddings, ids = load(str(tmp_path)).load_embeddings(), torch.arange(97)
    torch.testing.assert_close(embeddings(ids), embeddings.weight * 32**0.5)


@torch.no_grad()
def test_new_weights_change_what_was_read_and_nothing_else_is(tmp_path: Path) -> None:
    make_architecture("phi").save_pretrained(tmp_path)
    other, alone, ids = make_architecture("phi", seed=1), load(str(tmp_path)), torch.arange(97)
    weights = dict(other.named_parameters())
    head = alone.head
    alone.update(weights.items())
    assert head.bias is not None
    assert torch.equal(head.weight, weights["lm_head.weight"])
    assert torch.equal(head.bias, weights["lm_head.bias"])
    embeddings = alone.load_embeddings()
    assert not torch.equal(embeddings(ids), other.get_input_embeddings()(ids)), "of the files, until it is told"
    alone.update(weights.items())
    assert torch.equal(embeddings(ids), other.get_input_embeddings()(ids))
    read = {name for name, one in alone.model.named_parameters() if not one.is_meta}
    assert read == {"lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"}


@pytest.mark.parametrize(("lost", "message"), [
    ("lm_head.weight", r"LM head as lm_head.weight, of shape \[97, 32\], found nothing"),
    ("model.embed_tokens.weight", r"input embeddings as model.embed_tokens.weight, of shape \[97, 32\], found nothing"),
])  # fmt: skip
def test_files_that_lack_a_part_are_told(lost: str, message: str, tmp_path: Path) -> None:
    make_architecture("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KdflowError, match=message):
        load(str(tmp_path)).load_embeddings()
