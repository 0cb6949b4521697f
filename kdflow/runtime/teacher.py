"""The teacher of a run: an engine, whose rows are checked and seen through its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import torch

from kdflow.contracts import Batch, Head, KdflowError, Lease, Side, TeacherEngine, TokenBatch
from kdflow.contracts.returned import require_leases
from kdflow.runtime.phases import Phases
from kdflow.runtime.turns import awake

Scored = tuple[Lease, Side]


class Teacher:
    """A teacher engine, and the size of its vocabulary without padding.

    An engine that works beside the student, or in turns with it, is asked by a thread, which is asked for everything:
    where ranks share an engine, they must ask in the same order.
    """

    def __init__(self, engine: TeacherEngine, valid_vocab: int) -> None:
        self.engine, self._valid_vocab = engine, valid_vocab
        self._thread: ThreadPoolExecutor | None = None
        if (engine.overlaps or engine.at_once > 1) and not engine.context.sleeps:
            device = engine.context.device
            prepare = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
            self._thread = ThreadPoolExecutor(1, "kdflow-teacher", *prepare)

    @property
    def beside(self) -> bool:
        """Whether it is asked while this process goes on: by a thread."""
        return self._thread is not None

    @property
    def in_turns(self) -> bool:
        """Whether what is asked for ahead takes all the room there is: whoever asks in between would wait for ever."""
        return self.beside and not self.engine.overlaps

    @property
    def queues(self) -> bool:
        """Whether to score is to tell this process's device to: nobody is waited for, and no turns are taken."""
        return not self.beside and not self.engine.context.sleeps

    @property
    def head(self) -> Head:
        """The engine's head, with the padding of its vocabulary masked."""
        return replace(self.engine.head, valid_vocab=self._valid_vocab)

    def score(self, batch: Batch) -> Scored:
        """The lease on the teacher's rows, and its side of the micro-batch.

        Raises:
            KdflowError: the engine gave no rows, or those of other tokens.
        """
        return self._score(batch) if self._thread is None else self._thread.submit(self._score, batch).result()

    def each(self, batches: Sequence[Batch]) -> Iterator[Scored]:
        """:meth:`score` of each, as many together as the engine takes.

        Where a thread asks, the next of them are asked for before these are learnt from, and the first at once. An
        engine that takes several begins when there is room for their rows: those before must have been released.
        Elsewhere they are scored when the first of them is taken; an engine that sleeps scores them all in one turn.
        """
        size = 1 if self.engine.overlaps else self.engine.at_once
        together = [batches[first : first + size] for first in range(0, len(batches), size)]
        if self.engine.context.sleeps:
            return self._in_one_turn(together)
        if self._thread is None or not together:
            return chain.from_iterable(map(self._score_all, together))
        return self._ahead(self._thread, together, self._thread.submit(self._score_all, together[0]))

    def _ahead(
        self, thread: ThreadPoolExecutor, together: Sequence[Sequence[Batch]], pending: Future[list[Scored]]
    ) -> Iterator[Scored]:
        for following in together[1:]:
            scored, pending = pending.result(), thread.submit(self._score_all, following)
            yield from scored
        yield from pending.result()

    def _in_one_turn(self, together: Sequence[Sequence[Batch]]) -> Iterator[Scored]:
        with awake(self.engine):
            kept = [self._kept(*scored) for batches in together for scored in self._score_all(batches)]
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
        leases = require_leases(self.engine, self.engine.score_all(asked), self.engine.spec.hidden_size)
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


class Taught:
    """The teacher's side of the next micro-batch, which is waited for when it is asked for; None without a teacher."""

    def __init__(self, scored: Iterator[Scored | tuple[None, None]], phases: Phases) -> None:
        self._scored, self._phases = scored, phases
        self._taken: Scored | tuple[None, None] | None = None

    def __call__(self) -> Side | None:
        """The side, also when it is asked for again."""
        if self._taken is None:
            with self._phases("teacher"):
                self._taken = next(self._scored)
        return self._taken[1]

    def release(self) -> None:
        """Give its rows back."""
        if self._taken is not None and self._taken[0] is not None:
            self._taken[0].release()
