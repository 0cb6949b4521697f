"""What a run will take of a device, estimated from models without weights: bytes, and floating-point operations."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from kdflow import ops
from kdflow.config import LoraConfig, RunConfig, StudentConfig, TrainingConfig
from kdflow.models.head import read_head
from kdflow.models.loading import blocks, meta_model
from kdflow.models.lora import LINEAR, targets
from kdflow.models.packed import decoder

_PLANNED = "kdflow_planned"
# Buffers of a chunk of logits that live at once: both sides in the compute dtype and in fp32, their log-probabilities,
# and the gradient; compared with what a GPU really takes by tests/gpu/test_memory.py.
_HEAD_BUFFERS = 8


class _Planned(torch.autograd.Function):
    """Keeps what fused attention keeps for its backward pass, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        ctx.save_for_backward(query, key, value, attended, query.new_empty(query.shape[:3], dtype=torch.float32))
        return attended


def _planned(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Planned.apply(query, key, value), None  # type: ignore[no-untyped-call]


AttentionInterface.register(_PLANNED, _planned)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and what one micro-batch keeps of it for the backward pass.

    ``trained`` is how many parameters move: all, or those of the adapters alone. ``saved_bytes`` is None where the
    architecture cannot be run without weights, as where experts are chosen by value.
    """

    name: str
    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    block_parameters: int
    root_parameters: int
    trained: int
    saved_bytes: int | None


def shape(model: str, dtype: torch.dtype, tokens: int, student: StudentConfig | None = None) -> Shape:
    """The shape of a model; of the one that ``student`` tells of, also what a micro-batch of ``tokens`` keeps."""
    built = meta_model(model, dtype, student.keep_layers if student else None, _PLANNED)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks(built))
    inside = sum(p.numel() for p in blocks(built).parameters())
    total = sum(p.numel() for p in built.parameters())
    trained = total if student is None or student.lora is None else _adapters(built, student.lora)
    return Shape(
        type(built).__name__, total, len(blocks(built)), built.config.hidden_size, read_head(built).vocab_size,
        largest, total - inside, trained, _saved(built, tokens) if student else None,
    )  # fmt: skip


def _adapters(model: transformers.PreTrainedModel, lora: LoraConfig) -> int:
    """Parameters of the adapters: a row and a column of each target a rank."""
    names = tuple(targets(model, lora.targets))
    found = (module for name, module in model.named_modules() if name.endswith(names) and isinstance(module, LINEAR))
    return sum(lora.rank * sum(module.weight.shape) for module in found)


def _saved(model: transformers.PreTrainedModel, tokens: int) -> int | None:
    """Bytes that a forward pass of ``tokens`` tokens keeps, each storage once, parameters not counted."""
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no other storage takes its place
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(model)(input_ids=ids, position_ids=ids, use_cache=False)
    except Exception:  # architectures fail as they like
        return None
    return sum(size for size, _ in kept.values())


def estimate(
    config: RunConfig, student: Shape, teacher: Shape | None, devices: int, kernel: bool = False
) -> dict[str, int | None]:
    """Bytes on each of ``devices``, by what they are for; None is not known.

    ``kernel`` says whether the algorithm is a divergence for which the head has a kernel.
    """
    training, tokens = config.training, config.data.max_tokens
    compute = getattr(torch, training.dtype).itemsize
    master, moments = _bytes_a_parameter(training)
    frozen = student.parameters if config.student.lora is not None else 0
    # FSDP gathers one block ahead of the one that computes; the root, with embeddings and head, stays gathered.
    gathered = (2 * student.block_parameters + student.root_parameters) * compute
    reduced = min(student.trained, student.block_parameters + student.root_parameters) * compute
    activations, every = student.saved_bytes, int(training.activation_checkpointing)
    if activations is not None and every:
        recomputed = math.ceil(student.layers / every)
        inputs = recomputed * tokens * student.hidden_size * compute
        activations = activations * (student.layers - recomputed + 1) // student.layers + inputs
    widest = max(student.vocab_size, teacher.vocab_size if teacher else 0)
    with ops.chunk_rows(training.head_chunk):
        chunk = min(tokens, ops.rows_per_chunk(widest))
        logits = chunk * widest * 4 * _HEAD_BUFFERS
        if kernel and teacher is not None and training.dtype == "bfloat16":
            own, theirs = ops.kernel_chunk(tokens, student.vocab_size)
            logits = (min(tokens, own) * student.vocab_size + min(tokens, theirs) * teacher.vocab_size) * compute
    head_gradient = 0 if frozen else student.vocab_size * student.hidden_size * 4
    found: dict[str, int | None] = {
        "parameters": int((student.trained * master + frozen * compute) / devices + gathered),
        "gradients": int(student.trained * master / devices + reduced),
        "optimizer": int(student.trained * moments / devices),
        "activations": activations,
        "head": logits + head_gradient,
    }
    if teacher is not None:
        found["teacher"] = teacher.parameters * compute
        found["teacher_rows"] = tokens * teacher.hidden_size * compute
        if config.teacher is not None and config.teacher.follow is not None:
            found["following_weights"] = int(student.trained * master / devices)
    if config.rollout_fraction > 0:
        found["rollout_engine"] = student.parameters * compute
    known = [value for value in found.values() if value is not None]
    return {**found, "total": sum(known)}


def capacity() -> int:
    """Bytes of this machine's device, or of its main memory where it has none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def checkpoint_bytes(student: Shape, training: TrainingConfig) -> int:
    """Bytes of all checkpoints that are kept, and of the one that is being written: what is trained, two moments."""
    return (training.keep_checkpoints + 1) * student.trained * sum(_bytes_a_parameter(training))


def _bytes_a_parameter(training: TrainingConfig) -> tuple[int, int]:
    """Bytes of a trained parameter itself, and of its two moments."""
    master = getattr(torch, training.parameters).itemsize
    return master, 2 if training.optimizer == "adamw_8bit" else 2 * master


def step_flops(student: Shape, teacher: Shape | None, tokens: float, targets: float, recompute: bool) -> float:
    """Floating-point operations of an optimizer step, attention's own products left out.

    Two a parameter and token forward, four backward; heads at targets only.
    """
    body = student.parameters - student.vocab_size * student.hidden_size
    total = (8 if recompute else 6) * body * tokens + 6 * student.vocab_size * student.hidden_size * targets
    if teacher is not None:
        body = teacher.parameters - teacher.vocab_size * teacher.hidden_size
        total += 2 * body * tokens + 2 * teacher.vocab_size * teacher.hidden_size * targets
    return total
