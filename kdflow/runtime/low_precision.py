"""AdamW in less memory: bf16 parameters with stochastic rounding, and 8-bit moments through torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CHUNK = 1 << 24  # parameters that are held in fp32 at a time
BLOCKS = (256, 128, 64)  # moments that may share a scale, the first that fits; torchao's own is 256
SMALLEST = 4096  # parameters with fewer elements keep their moments as they are, as in bitsandbytes and torchao


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose bf16 parameters and moments are computed in fp32 and rounded stochastically.

    Rounding to the nearest loses updates below 1/256 of a parameter, and freezes a second moment whose 1 - beta2 is
    below that; stochastic rounding is right on average (arXiv 2010.06192). The random numbers are torch's own, those
    that a checkpoint holds; each rank draws its own for its shard.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the parameters that have a gradient."""
        assert closure is None, "the loop computes its own loss"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(group, parameter, self.state[parameter])

    def _move(self, group: dict[str, Any], parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        state["step"] += 1
        step = state["step"].item()
        tensors = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        flat = [torch.split(_local(cast(Tensor, tensor)).view(-1), CHUNK) for tensor in tensors]
        for weight, gradient, mean, square in zip(*flat, strict=True):
            gradient = gradient.float()
            first = mean.float().lerp_(gradient, 1 - beta1)
            second = square.float().lerp_(gradient.square(), 1 - beta2)
            scale = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
            moved = weight.float().mul_(1 - rate * group["weight_decay"])
            moved.addcdiv_(first, scale, value=-rate / (1 - beta1**step))
            for target, exact in ((weight, moved), (mean, first), (square, second)):
                target.copy_(round_stochastically(exact))


def round_stochastically(exact: Tensor) -> Tensor:
    """fp32 to one of the two nearest bf16 values, the nearer more likely: the mean is the exact value.

    bf16 is the upper half of fp32: adding 16 random bits carries into it as often as the lower half is large.
    """
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    return noise.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()


def adamw_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """torchao's AdamW with 8-bit moments (arXiv 2110.02861), of which fp32 exists only for a parameter at a time.

    The blocks that share a scale lie within rows, so that they are the same on any number of ranks. torchao's own rule
    goes by the shard of a rank.
    """
    from torchao.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas, bf16_stochastic_round=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": _zeros(parameter, signed=True),
                "exp_avg_sq": _zeros(parameter, signed=False),
            }
    return optimizer


def _zeros(parameter: nn.Parameter, signed: bool) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    block = _block(parameter)
    local = _local(parameter.data)
    if block is None or not local.numel():
        return torch.zeros_like(parameter, dtype=torch.float32)
    zeros = OptimState8bit.zeros(local.shape, signed, block, local.device, torch.float32)
    return _like(parameter.data, zeros)


def _block(parameter: Tensor) -> int | None:
    """How many moments share a scale; None where they are not quantized."""
    if parameter.ndim < 2 or parameter.numel() < SMALLEST:
        return None
    return next((block for block in BLOCKS if parameter.shape[-1] % block == 0), None)


def plain_8bit(parameter: Tensor, moment: Tensor) -> dict[str, Tensor]:
    """The tensors inside an 8-bit moment, sharded like its parameter: ``codes`` of its shape, a ``scale`` a block."""
    block = _block(parameter)
    if block is None:
        return {"": moment}
    local = _local(moment)
    scales = (*local.shape[:-1], local.shape[-1] // block)
    if not local.numel():  # this rank has no rows
        codes, scale = local.to(torch.uint8), local.new_zeros(scales, dtype=torch.float32)
    else:
        codes, scale = cast(Any, local).codes, cast(Any, local).scale.view(scales)
    return {".codes": _like(parameter, codes), ".scale": _like(parameter, scale, parameter.shape[-1] // block)}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, local: Tensor, last: int | None = None) -> Tensor:
    """This rank's part of a tensor that is sharded like ``parameter``, with ``last`` as its last dimension."""
    assert isinstance(parameter, DTensor), "the student is sharded before its optimizer is made"
    shape = torch.Size((*parameter.shape[:-1], last or parameter.shape[-1]))
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape,
                              stride=torch.empty(shape, device="meta").stride())  # fmt: skip
