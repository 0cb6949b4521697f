"""Keeps an engine at work: it is started, asked, put to sleep, and started again where it died."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from kdflow.contracts import KdflowError
from kdflow.engines.sglang.handover import Handover
from kdflow.engines.sglang.process import EngineDied, EngineProcess

_log = logging.getLogger("kdflow")
FAILURES = 3  # in a row, and no more

T = TypeVar("T")


class Supervisor:
    """An engine's process, which has the newest weights whenever it is up.

    Args:
        engine: not started yet.
        weights: that it gets whenever it is started, if it had any but those of its files.
        section: of the run file, for messages.
        prepare: called before each start.

    Attributes:
        restarts: how often the engine had to be started again.
    """

    def __init__(
        self, engine: EngineProcess, weights: Handover, section: str, prepare: Callable[[], None] = lambda: None
    ) -> None:
        self._engine, self._weights, self._section, self._prepare = engine, weights, section, prepare
        self._asleep = False
        self.restarts = 0

    def begin(self, model: str, started: Callable[[], object] = lambda: None) -> None:
        """Start the engine for the first time, and then call ``started``.

        Raises:
            KdflowError: it died of it.
        """
        try:
            self._start(started)
        except EngineDied as error:
            raise KdflowError(f"{self._section} 'sglang' does not start with {model}: {error}") from None

    def run(self, work: Callable[[], T], started: Callable[[], object] = lambda: None) -> T:
        """What ``work`` gives, which asks the engine; if it dies of it, it is started again and asked again.

        Args:
            work: asks the engine.
            started: called after each start, before the work.

        Raises:
            KdflowError: the engine failed three times in a row.
        """
        failures: list[EngineDied] = []
        while len(failures) < FAILURES:
            try:
                if not self._engine.running:
                    self.restarts += 1
                    self._start(started)
                return work()
            except EngineDied as error:
                failures.append(error)
                _log.warning(f"{self._section} 'sglang' failed, {len(failures)} of at most {FAILURES} times: {error}")
        raise KdflowError(
            f"{self._section} 'sglang' failed {FAILURES} times in a row, the last time since "
            f"{failures[-1]}\nMend the cause: where memory ran out, give the engine another memory_fraction, or a "
            "teacher a smaller data.max_tokens"
        )

    def _start(self, started: Callable[[], object]) -> None:
        self._prepare()
        self._engine.start()
        self._asleep = False
        self._weights.restore()
        started()

    def sleep(self) -> None:
        """Let the engine give its memory of the device back; one that is gone has none."""
        if self._engine.running and not self._asleep:
            try:
                self._engine.ask("sleep")
                self._asleep = True
            except EngineDied as error:
                _log.warning(f"{self._section} 'sglang' died when it was put to sleep: {error}")

    def wake(self, started: Callable[[], object] = lambda: None) -> None:
        """Let it take its memory again; one that is gone is started again, and then ``started`` is called.

        Raises:
            KdflowError: it failed three times in a row.
        """
        self.run(self._wake, started)

    def _wake(self) -> None:
        if self._asleep:
            self._engine.ask("wake")
            self._asleep = False

    def close(self) -> None:
        """End the engine's processes and free the weights."""
        self._engine.close()
        self._weights.close()
