"""LoRA through peft: small trainable matrices beside the frozen linear layers of the blocks (arXiv 2106.09685)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdflow.config import LoraConfig, StudentConfig
from kdflow.contracts import KdflowError
from kdflow.models.loading import blocks, config_digest, weights_digest
from kdflow.validation import nearest

LINEAR = (nn.Linear, Conv1D)


def add_adapters(model: transformers.PreTrainedModel, lora: LoraConfig, dtype: torch.dtype) -> Any:
    """Put adapters into a model, in place, and freeze everything else. They change nothing before they are trained.

    Args:
        model: a causal language model.
        lora: what the run file says.
        dtype: of the adapters.

    Returns:
        The ``peft.PeftModel`` around the same model, for merging and saving.

    Raises:
        KdflowError: a target is no linear layer of the blocks.
    """
    import peft

    names = targets(model, lora.targets)
    transposed = any(isinstance(module, Conv1D) for module in blocks(model).modules())
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout,
                             target_modules=names, bias="none", fan_in_fan_out=transposed)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by a name that is going
        # Not peft's own choice of a dtype: whatever FSDP trains in one group must have the same.
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def merged(model: nn.Module, whole: Callable[[Iterable[Tensor]], Iterable[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights that are trained, by the names they have without adapters, whose part is added to their layer's.

    Args:
        model: with adapters or without.
        whole: makes tensors of parameters that may be sharded.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for name, module in adapted.items():
        parts: Any = module
        down, up, base = whole(
            (parts.lora_A["default"].weight, parts.lora_B["default"].weight, parts.base_layer.weight)
        )
        change = (up.float() @ down.float()) * parts.scaling["default"]
        yield f"{name}.weight", (base + (change.T if parts.fan_in_fan_out else change)).to(base.dtype)
    others = {
        name: parameter for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(name.startswith(f"{layer}.") for layer in adapted)
    }  # fmt: skip
    yield from zip(others, whole(others.values()), strict=True)


def targets(model: transformers.PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """The layers that get adapters, as peft takes them: the last parts of module names.

    Args:
        model: the student.
        wanted: ``"all-linear"``, or such names.

    Raises:
        KdflowError: a name stands for no module, for the head, for the embeddings, or for something that is not linear.
    """
    linear = {
        name.rpartition(".")[2]
        for block in blocks(model)
        for name, module in block.named_modules()
        if isinstance(module, LINEAR)
    }
    if wanted == "all-linear":
        return sorted(linear)
    choice = f"choose among {', '.join(sorted(linear))}, or write all-linear"
    special = {
        id(model.get_output_embeddings()): "the LM head",  # type: ignore[no-untyped-call]
        id(model.get_input_embeddings()): "the embeddings",
    }
    for target in wanted:
        key = f"student.lora.targets: '{target}'"
        found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found:
            raise KdflowError(f"{key} is no module of the student{nearest(target, sorted(linear)) or ';'} {choice}")
        for module in found:
            if (part := special.get(id(module))) is not None:
                raise KdflowError(f"{key} is {part} of the student, which stays as it is; {choice}")
            if not isinstance(module, LINEAR):
                raise KdflowError(f"{key} is a {type(module).__name__}, which is no linear layer; {choice}")
    return list(wanted)


def identity(student: StudentConfig) -> dict[str, Any] | None:
    """What adapters belong to and are shaped by, None without adapters: on another base they would be noise."""
    if student.lora is None:
        return None
    options = student.lora.model_dump(exclude={"dropout"})
    return {
        "the weights of student.model": weights_digest(student.model),
        "the config of student.model": config_digest(student.model),
        "student.keep_layers": student.keep_layers,
        **{f"student.lora.{key}": value for key, value in options.items()},
    }
