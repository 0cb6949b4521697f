"""What happens in a run, told to its trackers by rank 0."""

from __future__ import annotations

import copy
import logging
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from kdflow.contracts import KdflowError, Tracker

_log = logging.getLogger("kdflow")


class Events:
    """Sends each event to every tracker, each its own copy to change as it likes; on other ranks there are none."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._started = ExitStack()

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """Tell the trackers that a run begins.

        Raises:
            KdflowError: a tracker failed; names it.
        """
        for tracker in self._trackers:
            with _named(tracker, "the run's start"):
                tracker.start(directory, copy.deepcopy(run), first_step)
            self._started.callback(_close, tracker)

    def emit(self, event: str, **fields: Any) -> None:
        """Tell the trackers that something happened: all of them, whatever one of them raises.

        What a run keeps when it ends of a tracker's error has then been told to the others, metrics.jsonl among them.

        Raises:
            KdflowError: a tracker failed; names it.
        """
        _log.debug(f"{event}: {fields}")
        problem: KdflowError | None = None
        for tracker in self._trackers:
            try:
                with _named(tracker, f"the event '{event}'"):
                    tracker.event(copy.deepcopy({"event": event, **fields}))
            except KdflowError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Tell the trackers that the run is over: all that have started, whatever one of them raises.

        Raises:
            KdflowError: a tracker failed; names it. It is only logged where the run ends of another error.
        """
        ends_of = sys.exception()
        try:
            self._started.close()
        except KdflowError as error:
            if ends_of is None:
                raise
            _log.warning(str(error))


def _close(tracker: Tracker) -> None:
    with _named(tracker, "the run's end"):
        tracker.close()


@contextmanager
def _named(tracker: Tracker, when: str) -> Iterator[None]:
    """Whatever a tracker raises is a KdflowError that names it."""
    try:
        yield
    except KdflowError:
        raise
    except Exception as error:  # plugins and their libraries raise what they like
        _log.debug(f"tracker '{tracker.name}'", exc_info=True)
        told = f"tracker '{tracker.name}' failed at {when}: {type(error).__name__}: {error}"
        raise KdflowError(f"{told}; mend it, or take it out of tracking") from None


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: on the device if it is a GPU, otherwise altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
