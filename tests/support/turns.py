"""Engines that leave their device when they sleep, on a machine whose only device is the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from kdflow.engines.transformers.rollout import TransformersRollout
from kdflow.engines.transformers.teacher import TransformersTeacher

_CLASSES: tuple[type[Any], ...] = (TransformersTeacher, TransformersRollout)


class Turns:
    """What sleeping engines move off their device is no tensor any more until they wake; nobody can compute with it.

    Attributes:
        begun: how often each class of engine has been woken.
        away: engines whose weights are not there.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun: Counter[str] = Counter()
        self.away: set[str] = set()
        self._kept: dict[nn.Parameter, tuple[bytes, torch.Size]] = {}
        for cls in _CLASSES:
            self._watch(patch, cls)

    def _watch(self, patch: pytest.MonkeyPatch, cls: type[Any]) -> None:
        sleep, wake = cls.sleep, cls.wake

        def sleeps(engine: Any) -> None:
            assert cls.__name__ not in self.away, "it sleeps already"
            with pytest.MonkeyPatch.context() as moving:
                moving.setattr(nn.Module, "to", lambda module, device: self._leave(module, device))
                sleep(engine)
            self.away.add(cls.__name__)

        def wakes(engine: Any) -> None:
            self.begun[cls.__name__] += 1
            self.away.remove(cls.__name__)
            with pytest.MonkeyPatch.context() as moving:
                moving.setattr(nn.Module, "to", lambda module, device: self._come(module, device))
                wake(engine)

        patch.setattr(cls, "sleep", sleeps)
        patch.setattr(cls, "wake", wakes)

    def _leave(self, module: nn.Module, device: torch.device | str) -> None:
        assert torch.device(device).type == "cpu"
        for parameter in module.parameters():
            data = parameter.data
            self._kept[parameter] = data.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), data.shape
            parameter.data = data.new_empty(0)

    def _come(self, module: nn.Module, device: torch.device) -> None:
        for parameter in module.parameters():
            content, shape = self._kept.pop(parameter)
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            parameter.data = data.view(parameter.dtype).view(shape)
