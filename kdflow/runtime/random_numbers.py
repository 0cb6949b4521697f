"""The state of this rank's random numbers, which dropout and stochastic rounding draw: part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kdflow.runtime.processes import Processes


def random_numbers(processes: Processes) -> dict[str, Tensor]:
    """The states as they are now, of the host's generator and of the device's, by name."""
    states = {f"rng.{processes.rank}": torch.get_rng_state()}
    if processes.device.type == "cuda":
        states[f"rng.{processes.rank}.cuda"] = torch.cuda.get_rng_state(processes.device)
    return states


def restore_random_numbers(processes: Processes, states: Mapping[str, Tensor]) -> None:
    """Go on from those of ``states`` that are this rank's."""
    if (state := states.get(f"rng.{processes.rank}")) is not None:
        torch.set_rng_state(state)
    if (state := states.get(f"rng.{processes.rank}.cuda")) is not None:
        torch.cuda.set_rng_state(state, processes.device)
