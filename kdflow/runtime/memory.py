"""What a run will take of a device, estimated from models without weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

from kdflow import ops
from kdflow.config import RunConfig, TrainingConfig
from kdflow.contracts import KdflowError, ModelBytes
from kdflow.models.activations import checkpoint_activations
from kdflow.models.flash import flash_attention
from kdflow.models.head import read_head
from kdflow.models.joined import joining
from kdflow.models.loading import blocks, meta_model
from kdflow.models.lora import add_adapters
from kdflow.models.packed import decoder
from kdflow.runtime.student import blocks_to_a_unit

_PLANNED = "kdflow_planned"
# Cuts a compiled block's graph in two as inductor does, which decides what is kept, and generates no code.
_PARTITION = "aot_eager_decomp_partition"
_FP32 = 4  # bytes; FSDP sums gradients in it, whatever they are computed in
# Bytes that plain torch holds of an element of a chunk of logits, in bf16 or fp32: in fp32 the logits of either side,
# their log-probabilities, two factors of the divergence and a gradient (forward KL; JSD takes 44).
_EAGER_BYTES = 28
_EAGER_SFT_BYTES = 16  # logits, log-probabilities and two gradients
# Logits of a chunk that a compiled divergence holds: of both sides, and their gradients, in the compute dtype. From the
# peak of benchmarks/head.py's "squared"; what sorts or takes the top k holds more.
_COMPILED_LOGITS = 4

HeadKind = Literal["kernel", "compiled", "eager"]


def _planned(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Packed attention as it is on a GPU; without weights its shapes alone are computed."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    bounds = query.new_empty(2, dtype=torch.int32)
    attended: Tensor = flash_attention(query, key, value, bounds, len(query), None, None)[0][None]
    return attended, None


AttentionInterface.register(_PLANNED, _planned)


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch keeps of the student for its backward pass.

    Attributes:
        kept: when the forward pass ends; of blocks that are computed again, their inputs.
        block: of one block that is not computed again.
    """

    kept: int
    block: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, in elements where nothing else is said.

    Attributes:
        name: of its class.
        parameters: all of them.
        layers: how many blocks.
        hidden_size: H.
        vocab_size: rows of its head.
        block_parameters: of the largest block.
        root_parameters: outside of the blocks.
        token_cache: keys and values of a token.
        attention: width of all heads of all blocks, by how many tokens a token sees at most; 0 of those that see all.
        trained: parameters that move: all, or those of the adapters alone.
        activations: of the student; None where the architecture cannot be run without weights, as where experts are
            chosen by value.
    """

    name: str
    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    block_parameters: int
    root_parameters: int
    token_cache: int
    attention: Mapping[int, int]
    trained: int
    activations: Activations | None = None

    @property
    def head(self) -> int:
        """Elements of the head's weight."""
        return self.vocab_size * self.hidden_size

    @property
    def body(self) -> int:
        """Parameters of all blocks."""
        return self.parameters - self.root_parameters

    def bytes(self, itemsize: int, max_tokens: int, device: int) -> ModelBytes:
        """What an engine can know of the model before it loads it."""
        return ModelBytes(
            weights=self.parameters * itemsize, head=self.head * itemsize, root=self.root_parameters * itemsize,
            token_cache=self.token_cache * itemsize, row=self.hidden_size * itemsize, max_tokens=max_tokens,
            device=device,
        )  # fmt: skip


def model_shape(model: str, dtype: torch.dtype, keep_layers: str | Sequence[int] | None = None) -> Shape:
    """The shape of a model, whatever becomes of it.

    Raises:
        KdflowError: there is no such model, it cannot be cut, or its sizes cannot be read.
    """
    return _shape(meta_model(model, dtype, keep_layers))


def teacher_shape(config: RunConfig) -> Shape | None:
    """The shape of a run's teacher, if it has one; one that follows the student is cut as the student is.

    Raises:
        KdflowError: there is no such model, it cannot be cut, or its sizes cannot be read.
    """
    teacher = config.teacher
    if teacher is None:
        return None
    kept = None if teacher.follow is None else config.student.keep_layers
    return model_shape(teacher.model, getattr(torch, config.training.dtype), kept)


def student_shape(config: RunConfig) -> Shape:
    """The shape of a run's student, and what its largest micro-batch keeps.

    Raises:
        KdflowError: there is no such model, it cannot be cut, adapted, or its blocks be computed again as is asked.
    """
    student, training = config.student, config.training
    dtype = getattr(torch, training.dtype)
    model = meta_model(student.model, dtype, student.keep_layers, _PLANNED).train()
    bare = _shape(model)
    if student.lora is not None:
        with torch.device("meta"):
            add_adapters(model, student.lora, dtype)
    if training.compile:
        for block in blocks(model):
            block.compile(backend=joining(_PARTITION))
    every = int(training.activation_checkpointing)
    whole = kept = _kept(model, config.data.max_tokens)
    if every:
        checkpoint_activations(model, every)
        kept = _kept(model, config.data.max_tokens)
    torch.compiler.reset()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = None if kept is None or whole is None else Activations(kept, whole // bare.layers)
    return Shape(**{**vars(bare), "trained": trained, "activations": found})


def _shape(model: transformers.PreTrainedModel) -> Shape:
    config = model.config
    if missing := [name for name in ("num_attention_heads", "hidden_size") if not hasattr(config, name)]:
        raise KdflowError(
            f"{type(model).__name__}: its config has no {missing[0]}; kdflow knows models that are made of attention"
        )
    heads: int = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys: int = getattr(config, "num_key_value_heads", None) or heads
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(sizes)
    windows = {"full_attention": 0, "sliding_attention": window}  # other blocks have another way than attention
    seen = Counter(windows[kind] for kind in kinds if kind in windows)
    total = sum(p.numel() for p in model.parameters())
    return Shape(
        type(model).__name__, total, len(sizes), config.hidden_size, read_head(model).vocab_size, max(sizes),
        total - sum(sizes), 2 * len(sizes) * keys * width,
        {most: count * heads * width for most, count in seen.items()}, total,
    )  # fmt: skip


def _kept(model: transformers.PreTrainedModel, tokens: int) -> int | None:
    """Bytes that a forward pass of ``tokens`` tokens keeps, each storage once, parameters not counted."""
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no other storage takes its place
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(model)(input_ids=ids, position_ids=ids, use_cache=False)
    except Exception:  # architectures fail as they like
        return None
    return sum(size for size, _ in kept.values())


@dataclass(frozen=True)
class Load:
    """What a device does in a step.

    Attributes:
        devices: how many share the student.
        targets: learnt tokens of a micro-batch, at most.
        micro_batches: of a device in a step.
        head: what computes the loss of a chunk of logits.
        engines: bytes that engines hold while the student learns, by the names that the plan gives them.
        awake: bytes of those that sleep meanwhile, when they have their turn.
    """

    devices: int
    targets: int
    micro_batches: int
    head: HeadKind
    engines: Mapping[str, int]
    awake: Mapping[str, int] = field(default_factory=dict)


def estimate(config: RunConfig, student: Shape, teacher: Shape | None, load: Load) -> tuple[str, dict[str, int | None]]:
    """When a device is fullest, and bytes on it then, by what they are for; None is not known.

    Of a run's teacher without a shape nothing is counted; its head is taken to be as wide as the student's.
    Not counted is what is no tensor of this process: CUDA's own state, and room between tensors.
    """
    training = config.training
    compute, (master, moments) = getattr(torch, training.dtype).itemsize, _bytes_a_parameter(training)
    frozen = student.parameters if config.student.lora is not None else 0
    sharing = max(1, load.devices // training.replicas)
    share = 1 / sharing
    root, block = student.root_parameters, student.block_parameters
    # What moves, of the root and of a block; adapters are in blocks alone.
    moving_root, moving_block = (0, student.trained // student.layers) if frozen else (root, block)
    shards = (student.trained * master + frozen * compute) * share
    if sharing == 1:  # nothing is let go of between micro-batches, and gradients wait for the last one, whole
        gathered = (student.trained + frozen) * compute
        summed: float = student.trained * _FP32
    else:  # the root stays gathered; of blocks, the one that computes, and the next, once in its flat buffer
        gathered = (root + 3 * block) * compute
        summed = student.trained * master * share
    waiting: float = summed if load.micro_batches > 1 else 0
    activations = student.activations or Activations(0, 0)
    logits, head_gradient = _head(config, student, teacher, load)
    every = int(training.activation_checkpointing)
    again = activations.block if every and (student.layers - 1) % every == 0 else 0  # the last block, which is first
    # A unit's gradients in fp32, again where several processes divide them by one, and what they are reduced to: when
    # its activations are gone.
    copies = (1 if load.devices == 1 else 2) + share
    reduced = blocks_to_a_unit(training, sharing == 1) * (moving_block * _FP32 * copies - activations.block)
    held = {"optimizer": student.trained * moments * share, **load.engines}
    if teacher is not None:
        scored = load.micro_batches if "teacher" in load.awake else 1  # in one turn
        held["teacher_rows"] = scored * load.targets * teacher.hidden_size * compute
    if following := _following_bytes(config):
        held["following_weights"] = student.trained * following * share
    peaks: dict[str, dict[str, float | None]] = {
        "in the head": {
            "parameters": shards + gathered, "gradients": waiting, "activations": activations.kept,
            "head": logits + head_gradient,
        },
        # The last block's activations make room for their gradients, one by one; those of the root wait for the end.
        "in the backward pass": {
            "parameters": shards + gathered,
            "gradients": waiting + moving_root * compute + max(head_gradient, moving_block * compute, reduced),
            "activations": activations.kept + again, "head": 0,
        },
        # All gradients, and those of the root, which is last, where they are reduced from.
        "before the update": {
            "parameters": shards, "gradients": student.trained * master * share + 2 * moving_root * _FP32,
            "activations": 0, "head": 0,
        },
    }  # fmt: skip
    for name, size in load.awake.items():
        peaks[f"in the turn of the {name.replace('_', ' ')}"] = {
            "parameters": shards, "gradients": 0, "activations": 0, "head": 0, name: size,
        }  # fmt: skip
    at = {when: {**held, **peak} for when, peak in peaks.items()}
    when = max(at, key=lambda name: sum(value or 0 for value in at[name].values()))
    found = {name: int(value or 0) for name, value in at[when].items()}
    unknown = {"activations": None} if student.activations is None else {}
    if config.teacher is not None and teacher is None:
        unknown |= {"teacher": None, "teacher_rows": None}
    return when, {**found, **unknown, "total": sum(found.values())}


def _head(config: RunConfig, student: Shape, teacher: Shape | None, load: Load) -> tuple[int, int]:
    """Bytes of a chunk of logits and of rows, and of what the gradient of the head is summed in."""
    training, compute = config.training, getattr(torch, config.training.dtype).itemsize
    targets, vocabulary = load.targets, student.vocab_size
    weight = 0 if config.student.lora is not None else vocabulary * student.hidden_size
    rows = 2 * targets * student.hidden_size * compute  # and their gradients
    widest = max(vocabulary, teacher.vocab_size if teacher else 0)
    with ops.chunk_rows(training.head_chunk):
        if load.head == "kernel":
            own, theirs = ops.kernel_chunk(targets, vocabulary, torch.device("cuda"))
            logits = min(targets, own) * vocabulary + min(targets, theirs) * (
                teacher.vocab_size if teacher else vocabulary
            )
            return logits * compute + rows, weight * _FP32
        if load.head == "compiled":
            chunk = min(targets, ops.even_rows_per_chunk(targets, widest))
            logits = chunk * widest * compute * _COMPILED_LOGITS
        else:
            chunk = min(targets, ops.rows_per_chunk(widest))
            logits = chunk * widest * (_EAGER_SFT_BYTES if config.teacher is None else _EAGER_BYTES)
    return logits + rows + weight * compute, weight * _FP32


def capacity() -> int:
    """Bytes of this machine's device, or of its main memory where it has none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def checkpoint_bytes(config: RunConfig, student: Shape) -> int:
    """Bytes of a checkpoint: what is trained, two moments, and a teacher that follows."""
    return student.trained * (sum(_bytes_a_parameter(config.training)) + _following_bytes(config))


def _following_bytes(config: RunConfig) -> int:
    """Bytes of a trained parameter in the weights of a teacher that follows, 0 without one."""
    follow = None if config.teacher is None else config.teacher.follow
    if follow is None:
        return 0
    return _bytes_a_parameter(config.training)[0] if follow.ema is None else _FP32


def _bytes_a_parameter(training: TrainingConfig) -> tuple[int, int]:
    """Bytes of a trained parameter itself, and of its two moments."""
    master = getattr(torch, training.parameters).itemsize
    return master, 2 if training.optimizer == "adamw_8bit" else 2 * master
