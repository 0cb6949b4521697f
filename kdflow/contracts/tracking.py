"""Who hears of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdflow.contracts.options import Configured

if TYPE_CHECKING:
    from pathlib import Path


class Tracker(Configured):
    """Hears every event of a run on rank 0: the objects of ``metrics.jsonl``, as they happen.

    ``Options`` are read from the tracker's entry in the run file's ``tracking``.
    """

    @abstractmethod
    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """A run begins in ``directory`` with the resolved run file ``run``; ``first_step`` > 1 is a resumed run."""

    @abstractmethod
    def event(self, event: Mapping[str, Any]) -> None:
        """Something happened; ``event["event"]`` says what."""

    @abstractmethod
    def close(self) -> None:
        """The run is over, or has failed."""


def scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event, without its ``step``: ``{"loss": 1.5, "phases/data": 0.1}``.

    Sections are joined by slashes. Texts, switches, lists and what is null are left out; what is infinite stays.
    """
    found: dict[str, float] = {}
    for key, value in event.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": number for name, number in scalars(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            found[key] = value
    return found
