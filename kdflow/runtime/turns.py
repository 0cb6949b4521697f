"""The memory of a device, which the student and engines that sleep use in turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kdflow.contracts import Engine


def wake(engine: Engine) -> None:
    """Begin the turn of an engine; nothing where it never sleeps."""
    if engine.context.sleeps:
        if engine.context.device.type == "cuda":
            torch.cuda.empty_cache()  # what the student's last step had taken
        engine.wake()


def rest(engine: Engine) -> None:
    """End it."""
    if engine.context.sleeps:
        engine.sleep()
        if engine.context.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def awake(engine: Engine) -> Iterator[None]:
    """The turn of an engine, for as long as the block lasts; what the block raises ends the run, and the engine."""
    wake(engine)
    yield
    rest(engine)
