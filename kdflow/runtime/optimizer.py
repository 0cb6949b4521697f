"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from kdflow.config import TrainingConfig


def make_optimizer(root: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only. Its state exists from the start: a checkpoint can be loaded into it."""
    parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate, betas=training.betas, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of step ``step``, from 1: linear warm-up, then constant, linear or cosine decay towards zero."""
    done, warmup = step - 1, math.ceil(training.warmup * training.last_step)
    if done < warmup:
        return training.learning_rate * (done + 1) / warmup
    progress = (done - warmup) / max(1, training.last_step - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
    return training.learning_rate * factor
