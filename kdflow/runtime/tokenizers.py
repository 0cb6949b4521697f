"""The tokenizers of a run, and what makes pairs of token sequences with them."""

from __future__ import annotations

import logging

from kdflow.config import RunConfig
from kdflow.contracts import Algorithm, KdflowError
from kdflow.data.rendering import SideTokenizer
from kdflow.data.tokenization import PairTokenizer
from kdflow.models.loading import context_length, load_tokenizer, same_tokenizer
from kdflow.plugins import Plugins
from kdflow.tokenizers.vocabulary import VocabularyComparison, compare_vocabularies

_log = logging.getLogger("kdflow")


def open_tokenizers(
    config: RunConfig, plugins: Plugins, algorithm: Algorithm
) -> tuple[PairTokenizer, VocabularyComparison | None]:
    """What tokenizes the samples of a run, and how the two vocabularies compare where there is a teacher."""
    student = SideTokenizer(load_tokenizer(config.student.model), "student")
    teacher = _teacher(config.teacher.model, config.student.model, student) if config.teacher else None
    vocabulary = compare_vocabularies(student.bytes_of, teacher.bytes_of) if teacher else None
    tokenize = PairTokenizer(
        student, teacher, max_length=_longest(config), too_long=config.data.too_long,
        same_targets=vocabulary is not None and vocabulary.same,
        aligner=plugins.aligner(**algorithm.aligner) if "aligner" in algorithm.needs else None,
    )  # fmt: skip
    return tokenize, vocabulary


def _teacher(model: str, of_student: str, student: SideTokenizer) -> SideTokenizer:
    """The teacher's: the student's own in a family that shares one, since to load and to compare it takes a second."""
    if same_tokenizer(model, of_student):
        return student.owned_by("teacher")
    return SideTokenizer(load_tokenizer(model), "teacher")


def _longest(config: RunConfig) -> int:
    """Tokens of the longest sample: no model is shown more than it has positions for."""
    models = {"student": config.student.model, **({"teacher": config.teacher.model} if config.teacher else {})}
    contexts = {side: _positions(model) or config.data.max_length for side, model in models.items()}
    side = min(contexts, key=lambda side: contexts[side])
    if contexts[side] < config.data.max_length:
        _log.warning(
            f"the {side} has positions for {contexts[side]} tokens: longer samples count as too long, although "
            f"data.max_length is {config.data.max_length}"
        )
    return min(contexts[side], config.data.max_length)


def _positions(model: str) -> int | None:
    try:
        return context_length(model)
    except KdflowError:  # a teacher's engine may run what transformers does not know
        return None


def require_shared_vocabulary(name: str, algorithm: Algorithm, vocabulary: VocabularyComparison | None) -> None:
    """Refuse models of different vocabularies where the algorithm compares distributions column by column.

    Raises:
        KdflowError: they differ; says where.
    """
    if vocabulary is None or vocabulary.same or "same_vocabulary" not in algorithm.needs:
        return
    raise KdflowError(
        f"algorithm '{name}' needs student and teacher to share a vocabulary, but the student's has "
        f"{vocabulary.student_size} ids and the teacher's {vocabulary.teacher_size}: {vocabulary.difference}. Choose a "
        "teacher of the student's family, or an algorithm between tokenizers: kdflow algorithms list"
    )
