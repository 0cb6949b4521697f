"""Activation checkpointing: blocks computed again in the backward pass, whose activations are not kept till then."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.modeling_layers import GradientCheckpointingLayer

from kdflow.contracts import KdflowError
from kdflow.models.loading import blocks

KEY = "training.activation_checkpointing"


def checkpoint_activations(model: transformers.PreTrainedModel, every: int) -> None:
    """Recompute every ``every``-th block, the first included; 0 recomputes none.

    Raises:
        KdflowError: the architecture cannot do so, or has fewer blocks.
    """
    if every == 0:
        return
    layers: Any = blocks(model)
    who = f"{type(model).__name__}"
    if every > len(layers):
        raise KdflowError(f"{KEY} is {every}, but the student has {len(layers)} blocks; give at most that, or true")
    if every > 1 and not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise KdflowError(f"{KEY}: the blocks of a {who} are recomputed all or none; give true or false")
    # Renamed in transformers 5.2x; both take the same arguments. Reentrant, adapters in a frozen block got no gradient.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise KdflowError(f"{KEY}: a {who} cannot recompute its blocks ({error}); give false") from None
    if every > 1:
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = index % every == 0
