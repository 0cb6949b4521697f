"""Whether two models share a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VocabularyComparison:
    """Two vocabularies, id by id.

    Attributes:
        student_size: one more than the student's largest id.
        teacher_size: one more than the teacher's largest id.
        shared: how many ids from 0 on stand for the same token on both sides.
    """

    student_size: int
    teacher_size: int
    shared: int
    difference: str | None

    @property
    def same(self) -> bool:
        """Whether every id of the smaller vocabulary means the same in the larger: sizes and padding may differ."""
        return self.shared == min(self.student_size, self.teacher_size)


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id; more than the number of tokens where ids have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def compare_vocabularies(student: Any, teacher: Any) -> VocabularyComparison:
    """Compare two Hugging Face tokenizers."""
    sides = [{index: token for token, index in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)]
    student_size, teacher_size = vocabulary_size(student), vocabulary_size(teacher)
    smaller = min(student_size, teacher_size)
    for index in range(smaller):
        ours, theirs = sides[0].get(index), sides[1].get(index)
        if ours != theirs:
            difference = f"id {index} is {ours!r} to the student and {theirs!r} to the teacher"
            return VocabularyComparison(student_size, teacher_size, index, difference)
    return VocabularyComparison(student_size, teacher_size, smaller, None)
