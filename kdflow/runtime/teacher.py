"""The teacher of a run: an engine, whose rows are checked and seen through its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from kdflow.contracts import Batch, Head, KdflowError, Lease, Side, TeacherEngine, TokenBatch
from kdflow.runtime.turns import awake

Scored = tuple[Lease, Side]


class Teacher:
    """A teacher engine, and the size of its vocabulary without padding.

    An engine that overlaps with the student is asked by a thread of its own, which is asked for everything: where ranks
    share an engine, they must ask in the same order.
    """

    def __init__(self, engine: TeacherEngine, valid_vocab: int) -> None:
        self.engine, self._valid_vocab = engine, valid_vocab
        self._thread: ThreadPoolExecutor | None = None
        if engine.overlaps:
            device = engine.context.device
            prepare = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
            self._thread = ThreadPoolExecutor(1, "kdflow-teacher", *prepare)

    @property
    def queues(self) -> bool:
        """Whether to score is to tell this process's device to: nobody is waited for, no turns are taken, and what is
        scored before a step's end is one micro-batch."""
        return not self.engine.overlaps and not self.engine.context.sleeps and self.engine.at_once == 1

    @property
    def head(self) -> Head:
        """The engine's head, with the padding of its vocabulary masked."""
        return replace(self.engine.head, valid_vocab=self._valid_vocab)

    def score(self, batch: Batch) -> Scored:
        """The lease on the teacher's rows, and its side of the micro-batch.

        Raises:
            KdflowError: the rows belong to other tokens.
        """
        return self._score(batch) if self._thread is None else self._thread.submit(self._score, batch).result()

    def each(self, batches: Sequence[Batch]) -> Iterator[Scored]:
        """:meth:`score` of each; one is scored ahead where the engine overlaps, the first of them at once.

        Elsewhere, as many are scored together as the engine takes, when the first of them is asked for: those before
        must have been released. An engine that sleeps scores them all in one turn.
        """
        if self.engine.context.sleeps:
            return self._in_one_turn(batches)
        if self._thread is None or not batches:
            return self._together(batches)
        return self._ahead(self._thread, batches, self._thread.submit(self._score, batches[0]))

    def _together(self, batches: Sequence[Batch]) -> Iterator[Scored]:
        for first in range(0, len(batches), self.engine.at_once):
            yield from self._score_all(batches[first : first + self.engine.at_once])

    def _ahead(self, thread: ThreadPoolExecutor, batches: Sequence[Batch], pending: Future[Scored]) -> Iterator[Scored]:
        for following in batches[1:]:
            scored, pending = pending.result(), thread.submit(self._score, following)
            yield scored
        yield pending.result()

    def _in_one_turn(self, batches: Sequence[Batch]) -> Iterator[Scored]:
        with awake(self.engine):
            kept = [self._kept(*scored) for scored in self._together(batches)]
        kept.reverse()
        while kept:
            yield kept.pop()

    @staticmethod
    def _kept(lease: Lease, side: Side) -> Scored:
        """The same with rows of their own: engines lend only a few micro-batches at a time."""
        rows = lease.rows.clone()
        lease.release()
        return Lease(rows, lease.digest), replace(side, rows=rows)

    def _score(self, batch: Batch) -> Scored:
        (scored,) = self._score_all([batch])
        return scored

    def _score_all(self, batches: Sequence[Batch]) -> list[Scored]:
        asked = [self._tokens(batch) for batch in batches]
        leases = self.engine.score_all(asked)
        sent = [(tokens.digest, len(tokens.targets)) for tokens in asked]
        if [(lease.digest, len(lease.rows)) for lease in leases] != sent:
            for lease in leases:
                lease.release()
            raise KdflowError(f"teacher engine '{self.engine.name}' returned rows of other tokens than it was sent")
        return [
            (lease, Side(tokens, lease.rows, self.head, tokens.response_of_target, self.engine.embed))
            for tokens, lease in zip(asked, leases, strict=True)
        ]

    @staticmethod
    def _tokens(batch: Batch) -> TokenBatch:
        assert batch.teacher is not None
        return batch.teacher

    def close(self) -> None:
        """Free the engine; what is being scored ends with it."""
        self.engine.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
