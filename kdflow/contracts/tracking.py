"""Who hears of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pathlib import Path


class Tracker(ABC):
    """Hears every event of a run on rank 0: the objects of ``metrics.jsonl``, as they happen."""

    name: ClassVar[str]
    paper: ClassVar[str | None] = None

    @abstractmethod
    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """A run begins in ``directory`` with the resolved run file ``run``; ``first_step`` > 1 is a resumed run."""

    @abstractmethod
    def event(self, event: Mapping[str, Any]) -> None:
        """Something happened; ``event["event"]`` says what."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, or has failed."""
