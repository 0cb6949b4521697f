"""The teacher of a run: an engine, whose rows are checked and seen through its head."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdflow.contracts import Batch, Head, KdflowError, Lease, Side, TeacherEngine


@dataclass(frozen=True)
class Teacher:
    """A teacher engine, and the size of its vocabulary without padding."""

    engine: TeacherEngine
    valid_vocab: int

    @property
    def head(self) -> Head:
        """The engine's head, with the padding of its vocabulary masked."""
        return replace(self.engine.head, valid_vocab=self.valid_vocab)

    def score(self, batch: Batch) -> tuple[Lease, Side]:
        """The lease on the teacher's rows, and its side of the micro-batch.

        Raises:
            KdflowError: the rows belong to other tokens.
        """
        assert batch.teacher is not None
        lease = self.engine.score(batch.teacher)
        if lease.digest != batch.teacher.digest or len(lease.rows) != len(batch.teacher.targets):
            raise KdflowError(f"teacher engine '{self.engine.name}' returned rows of other tokens than it was sent")
        return lease, Side(batch.teacher, lease.rows, self.head, batch.teacher.response_of_target, self.engine.embed)
