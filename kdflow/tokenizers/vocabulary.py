"""Whether two models share a vocabulary, and what they share of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdflow.contracts import ModelSpec
from kdflow.tokenizers.huggingface import from_transformers
from kdflow.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class VocabularyComparison:
    """Two vocabularies, id by id.

    Attributes:
        student_size: one more than the student's largest id.
        teacher_size: one more than the teacher's largest id.
        shared: how many ids from 0 on are without a difference in the sense of :attr:`same`.
        difference: the first one in that sense, in words; None where there is none.
        shared_ids: how many ids stand for the same token on both sides, special tokens included.
        shared_tokens: how many byte strings are an ordinary token on both sides, whatever their ids.
        renamed: ids below both sizes that are special or added tokens, or none, on both sides, but not the same:
            ``{id: (the student's, the teacher's)}``.
        roles: the special token of each role on either side, ``{"eos": ("<|im_end|>", "</s>"), …}``; None where a
            side has none.
        student_gaps: how many ids below the student's size are no token.
        teacher_gaps: how many ids below the teacher's size are no token.
    """

    student_size: int
    teacher_size: int
    shared: int
    difference: str | None
    shared_ids: int
    shared_tokens: int
    renamed: Mapping[int, tuple[str | None, str | None]]
    roles: Mapping[str, tuple[str | None, str | None]]
    student_gaps: int
    teacher_gaps: int

    @property
    def same(self) -> bool:
        """Whether distributions over the two vocabularies can be compared column by column.

        What must be equal are the ordinary tokens: every id below both sizes that is an ordinary token on one side
        spells the same bytes on the other. Tokens that were added to the vocabulary, special ones and others such as
        ``<think>``, may differ: a reserved one that got a name, another start of a turn. Such a column is the same
        place on both sides, and what it means is what the student is taught; they are in :attr:`renamed`. Ids past the
        smaller size, which are the added tokens of a later model of the family, and the rows by which a model's
        embedding is padded beyond its tokenizer, have no counterpart: they are masked.
        """
        return self.difference is None

    @property
    def renaming(self) -> str | None:
        """What differs although the vocabularies are the same, in words; None where nothing does."""
        if not self.renamed:
            return None
        index, (ours, theirs) = next(iter(self.renamed.items()))
        count = (
            "an added token differs," if len(self.renamed) == 1 else f"{len(self.renamed)} added tokens differ, first"
        )
        return f"{count} id {index}: {ours!r} to the student and {theirs!r} to the teacher"


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a transformers tokenizer; more than the number of tokens where ids have gaps."""
    return int(max(tokenizer.get_vocab().values())) + 1


def compare_vocabularies(student: Any, teacher: Any) -> VocabularyComparison:
    """Compare two tokenizers, each of :func:`kdflow.tokenizers.load` or of transformers.

    Raises:
        KdflowError: what the tokens of one of them stand for is not known.
    """
    ours, theirs = (side if isinstance(side, Tokenizer) else from_transformers(side) for side in (student, teacher))
    first = smaller = min(ours.vocabulary_size, theirs.vocabulary_size)
    difference: str | None = None
    renamed: dict[int, tuple[str | None, str | None]] = {}
    ours_by_id, theirs_by_id = _spellings(ours), _spellings(theirs)
    known = [index for index in {**ours_by_id, **theirs_by_id} if index < smaller]
    differing = sorted(index for index in known if ours_by_id.get(index) != theirs_by_id.get(index))
    our_text, their_text = dict(ordinary(ours)), dict(ordinary(theirs))
    for index in differing:
        one, other = ours_by_id.get(index), theirs_by_id.get(index)
        if index not in our_text and index not in their_text:
            renamed[index] = _name(one), _name(other)
        elif difference is None:
            first = index
            difference = f"id {index} is {_readable(one)!r} to the student and {_readable(other)!r} to the teacher"
    return VocabularyComparison(
        ours.vocabulary_size, theirs.vocabulary_size, first, difference, shared_ids=len(known) - len(differing),
        shared_tokens=len({*our_text.values()} & {*their_text.values()}), renamed=renamed,
        roles={role: (_named(ours, role), _named(theirs, role)) for role in ours.special.roles},
        student_gaps=ours.vocabulary_size - len(ours.vocabulary),
        teacher_gaps=theirs.vocabulary_size - len(theirs.vocabulary),
    )  # fmt: skip


def _spellings(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of each token, of a special one those of its name."""
    return {**tokenizer.vocabulary, **{index: name.encode() for index, name in tokenizer.special.tokens.items()}}


def ordinary(tokenizer: Tokenizer) -> list[tuple[int, bytes]]:
    """Ids and bytes of the tokens that stand for text and were learnt from text."""
    others = tokenizer.special.tokens.keys() | tokenizer.added.keys()
    return [(index, token) for index, token in tokenizer.vocabulary.items() if index not in others]


def _named(tokenizer: Tokenizer, role: str) -> str | None:
    index = tokenizer.special.roles[role]
    return None if index is None else tokenizer.special.tokens[index]


def _name(spelling: bytes | None) -> str | None:
    return None if spelling is None else spelling.decode()


def _readable(spelling: bytes | None) -> str | bytes | None:
    """As text, unless it is a part of a character."""
    try:
        return None if spelling is None else spelling.decode()
    except UnicodeDecodeError:
        return spelling


def shared_ids(student: ModelSpec, teacher: ModelSpec) -> tuple[Tensor, Tensor]:
    """Ids of the tokens that both vocabularies have, pair by pair, each id once.

    Ordinary tokens are the same where they spell the same bytes; what ends a response is the same whatever it is
    called. Without tokenizers, equal ids are, but those that a head knows for padding.
    """
    import torch

    if student.tokenizer is None or teacher.tokenizer is None:
        valid = (spec.head.valid_vocab if spec.head is not None else None for spec in (student, teacher))
        both = torch.arange(min(student.vocab_size, teacher.vocab_size, *(size for size in valid if size is not None)))
        return both, both.clone()
    ours, theirs = ids_by_bytes(student.tokenizer), ids_by_bytes(teacher.tokenizer)
    pairs = [(ours[token], theirs[token]) for token in ours if token in theirs]
    if student.end is not None and teacher.end is not None:
        pairs = [pair for pair in pairs if pair[0] != student.end and pair[1] != teacher.end]
        pairs.append((student.end, teacher.end))
    found = torch.tensor(sorted(pairs), dtype=torch.long).reshape(-1, 2)
    return found[:, 0].contiguous(), found[:, 1].contiguous()


def ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The id of each ordinary token by its bytes; of several, the one that the tokenizer writes text with."""
    found: dict[bytes, int] = {}
    for index, token in sorted(ordinary(tokenizer)):
        # Of a letter and the byte that it is, text is written with the letter: sentencepiece has both.
        if token and (token not in found or not _writes(tokenizer, found[token])):
            found[token] = index
    return found


def _writes(tokenizer: Tokenizer, index: int) -> bool:
    """Whether a tokenizer uses a token for its text, at the start or after something."""
    text = tokenizer.vocabulary[index].decode("utf-8", "replace")
    return any(index in tokenizer.encode(before + text) for before in ("", "x", " ", "\n"))
