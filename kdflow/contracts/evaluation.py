"""What a model is asked beside its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdflow.contracts.options import Configured

if TYPE_CHECKING:
    from kdflow.contracts.data import Sample


class SampleError(ValueError):
    """A sample that a model cannot be asked.

    Attributes:
        number: which of those that it was given, from 0.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"sample {number + 1}: {reason}")
        self.number, self.reason = number, reason


class EvaluatedModel(ABC):
    """A model as an evaluator sees it: text goes in, text or log-likelihoods come out."""

    @abstractmethod
    def respond(self, prompts: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """The greedy response to each prompt: a conversation that ends before the assistant's turn, or plain text.

        Prompts are of one kind, since one thing ends all responses.

        Raises:
            SampleError: a prompt cannot be rendered, or has no room for a response in the model's positions.
        """

    @abstractmethod
    def log_likelihoods(self, responses: Sequence[Sample]) -> list[float]:
        """The log-probability, in nats, of each response given its prompt, without the token that ends it.

        Raises:
            SampleError: a response cannot be rendered, has no token, or goes beyond the model's positions.
        """


class Evaluator(Configured):
    """Asks a model questions and counts. ``Options`` are read from the evaluator's entry in ``evaluation``."""

    @abstractmethod
    def evaluate(self, records: Sequence[Mapping[str, Any]], model: EvaluatedModel) -> Mapping[str, tuple[float, int]]:
        """Figures by name, each a finite sum and a count; a share, such as an accuracy, has a whole sum.

        Raises:
            ValueError: a record cannot be used; begin with ``record N:``, from 1, and the runtime adds the file.
        """
