"""The minimum-edit vocabulary map: for each token of one vocabulary the most similar one of another (FuseLLM)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from kdflow.cache import cache_folder
from kdflow.contracts import ModelSpec
from kdflow.files import replacing
from kdflow.tokenizers.vocabulary import ids_by_bytes, ordinary, shared_ids

_ROWS = 500  # tokens that are compared with the whole other vocabulary at a time: some 100 MB
_log = logging.getLogger("kdflow")


def nearest(tokens: Sequence[bytes], vocabulary: Sequence[bytes]) -> np.ndarray:
    """For each token the number of the entry of ``vocabulary`` at the smallest edit distance of bytes, int64 ``[n]``.

    An equal entry is its own; of several at one distance the first is taken, as FuseLLM does (arXiv 2401.10491).
    """
    places: dict[bytes, int] = {}
    for place, entry in enumerate(vocabulary):
        places.setdefault(entry, place)
    found = np.array([places.get(token, -1) for token in tokens], np.int64)
    missing = np.flatnonzero(found < 0)
    entries = [entry.decode("latin-1") for entry in vocabulary]  # a byte as a character
    for start in range(0, len(missing), _ROWS):
        chosen = missing[start : start + _ROWS]
        texts = [tokens[number].decode("latin-1") for number in chosen]
        found[chosen] = cdist(texts, entries, scorer=Levenshtein.distance, dtype=np.uint16, workers=-1).argmin(1)
    return found


def nearest_ids(student: ModelSpec, teacher: ModelSpec) -> np.ndarray:
    """The student's id for each id of the teacher, int64 ``[V_t]``; -1 of special tokens and padding.

    What ends a response is mapped to what ends one. Made once for two vocabularies and kept in kdflow's cache: between
    large vocabularies it takes a minute or two. Without tokenizers, an id is mapped to itself.
    """
    ids = np.full(teacher.vocab_size, -1, np.int64)
    if student.tokenizer is None or teacher.tokenizer is None:
        shared, _ = shared_ids(student, teacher)
        ids[: len(shared)] = shared
        return ids
    ours = sorted((index, token) for token, index in ids_by_bytes(student.tokenizer).items())
    theirs = sorted(ordinary(teacher.tokenizer))
    key = hashlib.sha256(repr((ours, theirs)).encode()).hexdigest()[:32]
    path = cache_folder("vocabulary_maps") / f"{key}.npy"
    if path.exists():
        places = np.load(path, allow_pickle=False)
    else:
        _log.warning(f"mapping {len(theirs)} tokens of the teacher to the student's {len(ours)}, once; kept in {path}")
        places = nearest([token for _, token in theirs], [token for _, token in ours])
        with replacing(path) as file:
            np.save(file, places)
    ids[[index for index, _ in theirs]] = np.array([index for index, _ in ours])[places]
    if student.end is not None and teacher.end is not None:
        ids[teacher.end] = student.end
    return ids
