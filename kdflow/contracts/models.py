"""Models as algorithms see them: a head, sizes, and one model's view of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdflow.contracts.data import TokenBatch
    from kdflow.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Head:
    """An LM head: ``logits = softcap · tanh((h Wᵀ + bias) · scale / softcap)``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: Gemma 2's bound on the logits, or None.
        valid_vocab: ids at and above this are padding of the weight, no tokens: their logits are -inf.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of the logits, padding included."""
        return int(self.weight.shape[0])

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors that can be trained."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def with_parameters(self, parameters: Sequence[Tensor]) -> Head:
        """The same head on other tensors, in the order of :meth:`parameters`."""
        bias = parameters[1] if len(parameters) > 1 else None
        return Head(parameters[0], bias, self.scale, self.softcap, self.valid_vocab)

    def over(self, tokens: Tensor) -> Head:
        """The head over some ``tokens`` alone, ids of which none is padding; gradients reach the whole one."""
        selected = [parameter.index_select(0, tokens) for parameter in self.parameters()]
        return replace(self.with_parameters(selected), valid_vocab=None)

    def logits(self, rows: Tensor, columns: Tensor | slice | None = None) -> Tensor:
        """Logits of ``rows [n, H]`` over ``columns`` (all), in fp32, or fp64 where the inputs are.

        The product runs in the inputs' dtype; columns are selected before it. Padding is -inf.
        """
        weight = self.weight if columns is None else self.weight[columns]
        logits = rows @ weight.to(rows.dtype).T
        if self.bias is not None:
            logits = logits + (self.bias if columns is None else self.bias[columns])
        if logits.element_size() < 4:
            logits = logits.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        if self.valid_vocab is not None and self.valid_vocab < self.vocab_size:
            if columns is None:
                padding = logits.new_zeros(self.vocab_size).bool()
                padding[self.valid_vocab :] = True
            else:
                ids = self._ids(columns, rows.device) if isinstance(columns, slice) else columns
                padding = ids >= self.valid_vocab
            logits = logits.masked_fill(padding, float("-inf"))
        return logits

    def _ids(self, columns: slice, device: torch.device) -> Tensor:
        import torch

        return torch.arange(*columns.indices(self.vocab_size), device=device)


@dataclass(frozen=True)
class ModelSpec:
    """What an algorithm may know of a model when it builds its own parameters.

    Attributes:
        hidden_size: of the rows that reach the head.
        vocab_size: rows of the head's weight, padding included.
        head: the head, whole; None where no weights are loaded.
        tokenizer: what :func:`kdflow.tokenizers.load` gives; None where there are tensors alone, and then an id is the
            same token to both models.
        end: the id that ends a response in the run's data; where that holds conversations beside plain text, a turn's.
    """

    hidden_size: int
    vocab_size: int
    head: Head | None = None
    tokenizer: Tokenizer | None = None
    end: int | None = None


@dataclass(frozen=True)
class Side:
    """One model's view of a micro-batch. Student and teacher are each a Side, with their own N, H and V.

    Attributes:
        tokens: the packed tokens.
        rows: hidden states at the target positions, after the final norm, ``[N, H]``.
        head: the LM head over them.
        response_of_row: ``[N]``, number of the response that each row belongs to.
        embed: ``ids [n] -> [n, H]``; only where the algorithm's ``needs`` name ``"embeddings"``.
    """

    tokens: TokenBatch
    rows: Tensor
    head: Head
    response_of_row: Tensor
    embed: Callable[[Tensor], Tensor] | None = None
