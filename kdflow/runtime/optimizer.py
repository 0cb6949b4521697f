"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kdflow.config import TrainingConfig
from kdflow.runtime.low_precision import StochasticAdamW, adamw_8bit, plain_8bit


def make_optimizer(
    root: nn.Module, training: TrainingConfig, rates: Mapping[nn.Parameter, float]
) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only. Its state exists from the start: a checkpoint can be loaded into it.

    Args:
        root: holds what is trained.
        training: the run's section.
        rates: learning rates, at the top of the schedule, of parameters that have one of their own.
    """
    parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = training.weight_decay if parameter.ndim >= 2 else 0.0
        kinds.setdefault((rates.get(parameter, training.learning_rate), decay), []).append(parameter)
    groups = [{"params": members, "weight_decay": decay, "peak": rate} for (rate, decay), members in kinds.items()]
    if training.optimizer == "adamw_8bit":
        return adamw_8bit(groups, training.learning_rate, training.betas)
    optimizer: torch.optim.Optimizer
    if fused := training.parameters == "float32":
        optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)
    else:
        optimizer = StochasticAdamW(groups, training.learning_rate, training.betas)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of one parameter as plain tensors, which share its memory."""
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, torch.optim.AdamW | StochasticAdamW):
        return dict(state)
    moments = {key: plain_8bit(parameter, state[key]) for key in state if key != "step"}
    plain = {f"{key}{part}": tensor for key, parts in moments.items() for part, tensor in parts.items()}
    return {"step": state["step"], **plain} if state else {}


def optimizer_step(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Move the parameters, each by this share of its learning rate."""
    for group in optimizer.param_groups:
        rate = group["peak"] * share
        if isinstance(group["lr"], Tensor):  # torchao compiles its step with the rate as an input
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    # torchao compiles a kernel for each shape: worth it on a GPU alone.
    with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
        optimizer.step()
    optimizer.zero_grad()


def schedule(step: int, training: TrainingConfig) -> float:
    """The share of the learning rate at step ``step``, from 1: linear warm-up, then constant, or a decay towards 0."""
    # Rounded first: 0.07 · 100 is a little over 7 to a computer.
    done, warmup = step - 1, math.ceil(round(training.warmup * training.last_step, 6))
    if done < warmup:
        return (done + 1) / warmup
    progress = (done - warmup) / max(1, training.last_step - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[training.schedule]
    return factor
