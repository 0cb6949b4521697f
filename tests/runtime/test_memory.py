"""The memory plan against what tensors really take, storage by storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import kdflow
from kdflow.models.loading import blocks
from kdflow.runtime import memory
from kdflow.runtime.check import check
from kdflow.runtime.checkpoint import Checkpoints
from tests.support.live import Live
from tests.support.models import make_tokenizer, texts, write_jsonl
from tests.support.turns import Turns

Run = Callable[..., dict[str, Any]]
TOKENS, VOCAB, HIDDEN, LAYERS = 512, 2048, 128, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Attention is narrow: on a CPU it keeps copies that it does not keep on a GPU."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    made = {}
    for name, hidden, layers in (("student", HIDDEN, LAYERS), ("teacher", 192, 6)):
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=TOKENS,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        made[name] = str(root / name)
    return made


@pytest.fixture
def run(models: dict[str, str], run_file: Run, tmp_path: Path) -> Run:
    """Three full micro-batches a step, in bf16; sections are merged into it."""
    text = " ".join(texts())
    records = [{"text": text[start : start + 4000]} for start in range(0, 20000, 4000)]

    def make(tokens: int = TOKENS, **sections: Any) -> dict[str, Any]:
        data = {"train": [{"path": write_jsonl(tmp_path / "long.jsonl", records), "format": "text"}], "eval": [],
                "max_length": tokens, "max_tokens": tokens}  # fmt: skip
        training = {"steps": 2, "tokens_per_step": 3 * tokens, "dtype": "bfloat16", "head_chunk": 64}
        sections["student"] = {"model": models["student"], **sections.get("student", {})}
        sections["training"] = {**training, **sections.get("training", {})}
        return run_file(**{"teacher": None, "algorithm": {"name": "sft"}, "data": data, **sections})

    return make


def plan(run: dict[str, Any], directory: Path, devices: int = 1) -> dict[str, Any]:
    (directory / "run.yaml").write_text(yaml.safe_dump(run))
    found = check(directory / "run.yaml", [], (), devices)
    assert found["problems"] == []
    planned: dict[str, Any] = found["memory"]
    return planned


def taken(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes that the tensors of a run came to."""
    # Checkpoints copy to the host, which on a CPU is the device.
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: None)
    with Live() as live:
        kdflow.train(run)
    return live.peak


BACKWARD, UPDATE = "in the backward pass", "before the update"
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "AdamW in fp32": ({}, "in the head"),
    "one micro-batch": ({"training": {"tokens_per_step": TOKENS}}, "in the head"),
    "few tokens": ({"tokens": 32, "training": {"tokens_per_step": 32}}, BACKWARD),
    "few tokens, blocks computed again": (
        {"tokens": 32, "training": {"tokens_per_step": 32, "activation_checkpointing": True}},
        UPDATE,
    ),
    "bf16 parameters": ({"training": {"parameters": "bfloat16"}}, "in the head"),
    "8-bit moments": ({"training": {"optimizer": "adamw_8bit"}}, "in the head"),
    "adapters": ({"student": {"lora": {"rank": 4}}}, "in the head"),
    "every block computed again": ({"training": {"activation_checkpointing": True}}, BACKWARD),
    "every second block computed again": ({"training": {"activation_checkpointing": 2}}, "in the head"),
    "computed in fp32": ({"training": {"dtype": "float32"}}, "in the head"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_plan_is_what_a_step_takes(run: Run, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections, fullest = OPTIONS[option]
    planned = plan(run(**sections), tmp_path)
    assert planned["bytes"]["total"] == pytest.approx(taken(run(**sections), monkeypatch), rel=0.03)
    assert planned["fullest"] == fullest


def test_a_teacher_in_the_same_process_is_counted(
    run: Run, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"teacher": {"model": models["teacher"]}, "algorithm": {"name": "forward_kl"}}
    planned = plan(run(**sections), tmp_path)
    assert planned["bytes"]["total"] == pytest.approx(taken(run(**sections), monkeypatch), rel=0.05)


def test_several_devices_share_what_is_trained_and_gather_a_block_at_a_time(run: Run, tmp_path: Path) -> None:
    one, eight = (plan(run(), tmp_path, devices)["bytes"] for devices in (1, 8))
    block, root = 3 * HIDDEN * 3 * HIDDEN + 4 * HIDDEN * 16 + 2 * HIDDEN, VOCAB * HIDDEN + HIDDEN
    trained = LAYERS * block + root
    assert one["parameters"] == trained * (4 + 2)
    assert eight["parameters"] == trained * 4 // 8 + (root + 3 * block) * 2
    assert (one["gradients"], one["optimizer"]) == (trained * 4, trained * 8)
    assert eight["optimizer"] == trained * 8 // 8
    assert eight["activations"] == one["activations"]
    replicas = plan(run(training={"replicas": 4}), tmp_path, 8)["bytes"]
    assert replicas["optimizer"] == trained * 8 // 2, "each of two ranks holds half"
    whole = plan(run(training={"replicas": 8}), tmp_path, 8)["bytes"]
    assert (whole["parameters"], whole["optimizer"]) == (one["parameters"], one["optimizer"]), "each rank holds all"


def test_learnt_tokens_alone_reach_the_head(run: Run, tmp_path: Path) -> None:
    record = {"prompt": "It is a truth universally acknowledged, ", "response": "that"}
    path = write_jsonl(tmp_path / "short.jsonl", [record] * 40)
    data = {"train": [{"path": path, "format": "prompt_response"}], "eval": [], "max_length": 256, "max_tokens": 256}
    part, whole = (plan(run(training={"head_chunk": 256}, **more), tmp_path) for more in ({"data": data}, {}))
    rows, gradient = 2 * HIDDEN * 2, VOCAB * HIDDEN * (2 + 4)
    counts = [(planned["bytes"]["head"] - gradient) / (VOCAB * 16 + rows) for planned in (part, whole)]
    assert counts[0] == round(counts[0])
    assert counts[0] < 256 / 4


def test_what_attention_keeps_is_counted_once() -> None:
    """The inputs, the output, the log of each query's sum, and the bounds of one sample."""
    query, key, value = (torch.zeros(1, 4, 16, 8, device="meta", requires_grad=True) for _ in range(3))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        attended, _ = memory._planned(torch.nn.Identity(), query, key, value)
    assert attended.shape == (1, 16, 4, 8)
    assert sorted(kept) == [2 * 4, 4 * 16 * 4, *[4 * 16 * 8 * 4] * 4]


def _product(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """In the place of attention, whose kernels differ from device to device."""
    return (query * key * value).transpose(1, 2), None


def test_what_compiled_blocks_keep_is_known_without_compiling_them(models: dict[str, str]) -> None:
    """Real storages, of code that inductor has made, against blocks that have neither."""
    AttentionInterface.register("product", _product)
    config = LlamaConfig.from_pretrained(models["student"], num_hidden_layers=2)
    kept = {}
    for device, backend in (("meta", None), ("meta", memory._PARTITION), ("cpu", "inductor")):
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="product").train()
        if backend is not None:
            for block in blocks(model):
                block.compile(backend=backend)
        kept[device, backend] = memory._kept(model, 64)
    torch.compiler.reset()
    plain, compiled = kept["meta", None], kept["cpu", "inductor"]
    assert plain is not None
    assert compiled is not None
    assert kept["meta", memory._PARTITION] == compiled
    assert compiled < 0.8 * plain


@pytest.mark.parametrize(("sections", "fullest"), [
    ({}, "in the head"),
    ({"tokens": 32, "student": {"lora": {"rank": 1}}, "training": {"tokens_per_step": 64, "head_chunk": 8}},
     "in the turn of the teacher"),
])  # fmt: skip
def test_a_teacher_that_sleeps_is_counted_in_its_turn(
    run: Run, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any],
    fullest: str,
) -> None:  # fmt: skip
    Turns(monkeypatch)
    sections = {**sections, "teacher": {"model": models["teacher"], "sleep": True}, "algorithm": {"name": "forward_kl"}}
    planned = plan(run(**sections), tmp_path)
    assert planned["bytes"]["total"] == pytest.approx(taken(run(**sections), monkeypatch), rel=0.05)
    assert planned["fullest"] == fullest
