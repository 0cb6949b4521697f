"""Any algorithm on raw tensors: no model, no engine, no run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdflow import plugins, validation
from kdflow.contracts import Algorithm, Batch, Head, LossSum, ModelSpec, Side, TargetAlignment, TokenBatch
from kdflow.data.alignment import aligned

Raw = Side | Mapping[str, Any]


@dataclass(frozen=True)
class LogitsHead(Head):
    """Stands where logits are given instead of hidden states: its rows are its logits, of some ``tokens`` or of all."""

    tokens: Tensor | None = None

    def parameters(self) -> tuple[Tensor, ...]:
        """None: the logits themselves are what is differentiated."""
        return ()

    def with_parameters(self, parameters: Sequence[Tensor]) -> Head:
        """Itself."""
        return self

    def over(self, tokens: Tensor) -> Head:
        """The same over some of its tokens."""
        of_rows = tokens if self.tokens is None else self.tokens[tokens]
        return replace(self, weight=self.weight[tokens], tokens=of_rows)

    def logits(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        """The rows, in fp32 at least."""
        own = rows if self.tokens is None else rows[:, self.tokens]
        chosen = own if columns is None else own[:, columns]
        return chosen.float() if chosen.element_size() < 4 else chosen


def side(raw: Raw) -> Side:
    """A :class:`~kdflow.contracts.Side` from raw tensors.

    Args:
        raw: a Side, or a mapping with

            * ``hidden [N, H]`` and ``head`` (a :class:`kdflow.Head` or its weight ``[V, H]``), or ``logits [N, V]``;
            * optionally ``labels [N]``, the reference next tokens (zeros otherwise), ``inputs [N]``, the tokens before
              them (each the label of the row before it otherwise), ``response [N]``, the number of each row's response
              (all 0 otherwise), and ``embed``, a function ``ids [n] -> [n, H]``.
    """
    if isinstance(raw, Side):
        return raw
    if set(raw) - {"labels", "inputs", "response", "embed"} not in ({"hidden", "head"}, {"logits"}):
        given = ", ".join(raw) or "nothing"
        raise ValueError(
            f"give 'hidden' and 'head', or 'logits'; 'labels', 'inputs', 'response' and 'embed' if any; not {given}"
        )
    if "logits" in raw:
        rows = raw["logits"]
        head: Head = LogitsHead(rows.new_empty(rows.shape[1], 0))
    else:
        rows, head = raw["hidden"], raw["head"] if isinstance(raw["head"], Head) else Head(raw["head"])
    labels, inputs, response = raw.get("labels"), raw.get("inputs"), raw.get("response")
    for name, entries in (("labels", labels), ("inputs", inputs), ("response", response)):
        if entries is not None and len(entries) != len(rows):
            raise ValueError(f"'{name}' need one entry for each of {len(rows)} rows, not {len(entries)}")
    labels = torch.zeros(len(rows), dtype=torch.long, device=rows.device) if labels is None else labels.long()
    response = torch.zeros_like(labels) if response is None else response.long()
    return Side(_tokens(labels, inputs, response), rows, head, response, raw.get("embed"))


def _tokens(labels: Tensor, inputs: Tensor | None, response: Tensor) -> TokenBatch:
    """One packed sequence in which row i predicts ``labels[i]``; given ``inputs``, each from a pair of tokens."""
    if inputs is None:
        ids = torch.cat([labels.new_zeros(1), labels])
        targets = torch.arange(len(labels), device=labels.device)
    else:
        ids = torch.stack([inputs.long(), labels], dim=1).flatten()
        targets = torch.arange(0, len(ids), 2, device=labels.device)
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32, device=labels.device)
    digest = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()
    return TokenBatch(ids, torch.arange(len(ids), device=ids.device), bounds, targets, response, len(ids), digest)


def by_number(algorithm: Algorithm, student: Side, teacher: Side | None) -> TargetAlignment | None:
    """Row i of a response with row i of it, as far as both sides reach: for rows of which no bytes are known.

    With a path, where the algorithm's aligner gives one; None where it wants no aligner.
    """
    if teacher is None or "aligner" not in algorithm.needs:
        return None
    aligner = plugins.load().aligner(**algorithm.aligner)
    places = []
    for side in (student, teacher):
        response = side.response_of_row.cpu().numpy()
        first = np.append(True, response[1:] != response[:-1])[: len(response)]
        starts = np.flatnonzero(first)[np.cumsum(first) - 1] if len(response) else response
        places.append(list(zip(response.tolist(), (np.arange(len(response)) - starts).tolist(), strict=True)))
    both = set(places[0]) & set(places[1])
    number = {place: at for at, place in enumerate(place for place in places[0] if place in both)}
    ours, theirs = (np.array([number.get(place, -1) for place in of_side], np.int64) for of_side in places)
    alignment = TargetAlignment(ours, theirs)
    if aligned(aligner, [b"a"], [b"a"]).path is None:
        return alignment
    return replace(alignment, path=np.stack(alignment.one_to_one(), axis=1))


def loss(name: str, options: Mapping[str, Any] | None, student: Raw, teacher: Raw | None = None,
         *, module: torch.nn.Module | None = None, alignment: TargetAlignment | None = None) -> LossSum:  # fmt: skip
    """The loss of one micro-batch under the algorithm ``name``, as the runtime would compute it.

    The algorithm sees what its ``needs`` name, and no more; no target was drawn by the student.

    Args:
        name: an algorithm or a divergence.
        options: its options.
        student: raw tensors, see :func:`side`; gradients reach those that require them.
        teacher: likewise, or None for algorithms that need none.
        module: in place of what the algorithm's ``build`` makes, which is moved to the device and dtype of the rows.
        alignment: of the two sides' rows, for algorithms that need one; by their numbers in each response otherwise.

    Returns:
        The **sum** over target tokens, with its graph, and the metrics.
    """
    algorithm = make(name, options)
    if "teacher" in algorithm.needs and teacher is None:
        raise ValueError(f"algorithm '{name}' needs a teacher")
    sides = side(student), None if teacher is None or "teacher" not in algorithm.needs else side(teacher)
    if "embeddings" not in algorithm.needs:
        sides = replace(sides[0], embed=None), None if sides[1] is None else replace(sides[1], embed=None)
    elif any(one is not None and one.embed is None for one in sides):
        raise ValueError(f"algorithm '{name}' needs 'hidden', 'head' and 'embed' of both sides")
    if module is None:
        specs = [None if one is None else ModelSpec(one.rows.shape[1], one.head.vocab_size, one.head) for one in sides]
        assert specs[0] is not None
        module = algorithm.build(specs[0], specs[1])
        if module is not None:
            module = module.to(sides[0].rows.device, sides[0].rows.dtype)
    algorithm.module = module
    if alignment is None:
        alignment = by_number(algorithm, *sides)
    sampled = np.full(len(sides[0].rows), np.nan)
    batch = Batch(sides[0].tokens, None if sides[1] is None else sides[1].tokens, alignment=alignment, sampled=sampled)
    return algorithm.loss(sides[0], sides[1], batch)


def make(name: str, options: Mapping[str, Any] | None) -> Algorithm:
    """The algorithm ``name`` with its options, without a module."""
    cls = plugins.load().algorithm(name)
    return cls(validation.validate_options(cls.Options, options or {}, f"algorithm '{name}'"))
