"""What a model is asked beside its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdflow.contracts.options import Configured

if TYPE_CHECKING:
    from kdflow.contracts.data import Sample


class EvaluatedModel(ABC):
    """A model as an evaluator sees it: text goes in, text or log-likelihoods come out."""

    @abstractmethod
    def respond(self, prompts: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """The greedy response to each prompt: a conversation that ends before the assistant's turn, or plain text."""

    @abstractmethod
    def log_likelihoods(self, responses: Sequence[Sample]) -> list[float]:
        """The log-probability, in nats, of each response given its prompt, without the token that ends it."""


class Evaluator(Configured):
    """Asks a model questions and counts. ``Options`` are read from the evaluator's entry in ``evaluation``."""

    @abstractmethod
    def evaluate(self, records: Sequence[Mapping[str, Any]], model: EvaluatedModel) -> Mapping[str, tuple[float, int]]:
        """Figures by name, each a sum and a count; a share, such as an accuracy, has a whole sum.

        Raises:
            ValueError: a record cannot be used; begin with ``record N:``, from 1, and the runtime adds the file.
        """
