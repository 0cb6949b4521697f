"""Forward-only models that write responses."""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdflow.contracts.engines import Engine
from kdflow.contracts.options import KdflowError


@dataclass(frozen=True)
class Sampling:
    """How a rollout engine samples.

    What is drawn for a prompt depends on its ids, ``seed`` and the number of the sample alone, not on the prompts
    beside it: equal prompts get equal responses until the seed changes. Engines that take no seed draw anew each time.

    Attributes:
        max_new_tokens: tokens of the longest response, the one that ends it included.
        temperature: the logits are divided by it; 0 takes the most likely token each time.
        top_p: draw from the smallest set of most likely tokens whose probability reaches this.
        n: responses to each prompt.
        seed: of all draws, at least 0.
        stop_ids: ids that end a response, besides those that the model itself ends with.
        max_length: tokens of a prompt and its response together, at most; None: the model's positions alone count.

    Raises:
        KdflowError: a value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a number from 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("n", self.n >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not fits:
                raise KdflowError(f"sampling: {name} must be {expected}, not {getattr(self, name)}")

    def require_different(self) -> None:
        """Check that several responses to a prompt may differ, where only such ones are of use.

        Raises:
            KdflowError: they are drawn without chance.
        """
        if self.temperature == 0 and self.n > 1:
            raise KdflowError(f"at temperature 0 the {self.n} responses to a prompt are the same: take n=1, or sample")

    def room(self, prompt: int, positions: int) -> int:
        """How many tokens may follow a prompt of so many in a model with these positions."""
        return min(self.max_new_tokens, min(self.max_length or positions, positions) - prompt)


@dataclass(frozen=True)
class Rollout:
    """One response.

    Attributes:
        ids: as sampled, the id that ended it included.
        log_probabilities: of each id, in nats, under the model at the sampling temperature and before ``top_p`` cuts
            anything off; at temperature 0 under the model as it is.
        finish: ``stop`` if an id ended it, ``length`` if it was cut off.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: Literal["stop", "length"] = "length"


class RolloutEngine(Engine):
    """Lets a model write responses."""

    @abstractmethod
    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """``sampling.n`` responses to each prompt, which has tokens, prompt by prompt."""

    def respond(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Rollout]]:
        """The same, the responses to each prompt by themselves.

        Raises:
            KdflowError: a prompt has no tokens, or the engine gave no list, more or fewer responses, or one that is not
                as :class:`Rollout` has it.
        """
        if empty := [number for number, ids in enumerate(prompt_ids) if len(ids) == 0]:
            raise KdflowError(f"prompt {empty[0]} has no tokens: there is nothing to go on from")
        rollouts = self.generate(prompt_ids, sampling)
        if not isinstance(rollouts, list):
            raise KdflowError(
                f"rollout engine '{self.name}': generate must return a list of kdflow.contracts.Rollout, but returned "
                f"{reprlib.repr(rollouts)}"
            )
        if len(rollouts) != len(prompt_ids) * sampling.n:
            raise KdflowError(
                f"rollout engine '{self.name}' gave {len(rollouts)} responses, not {sampling.n} to each of "
                f"{len(prompt_ids)} prompts"
            )
        for rollout in rollouts:
            if problem := _problem(rollout):
                raise KdflowError(f"rollout engine '{self.name}' gave {problem}")
        return [rollouts[first : first + sampling.n] for first in range(0, len(rollouts), sampling.n)]


# How far above 0 arithmetic may put the log-probability of a token that is all but certain, in nats; bf16 is coarse.
_ROUNDING = 0.2


def _problem(response: Any) -> str | None:
    """What is wrong with what should be a response, in words."""
    import numpy as np

    if not isinstance(response, Rollout):
        return f"{reprlib.repr(response)} in the place of a response, which is a kdflow.contracts.Rollout"
    ids: Any = response.ids
    log_probabilities: Any = response.log_probabilities
    if not (isinstance(ids, tuple | list) and isinstance(log_probabilities, tuple | list)):
        kinds = f"{type(ids).__name__} and {type(log_probabilities).__name__}"
        return f"ids and log-probabilities of a response as {kinds}; both are tuples of numbers"
    if len(ids) != len(log_probabilities):
        return f"{len(log_probabilities)} log-probabilities to a response of {len(ids)} ids; each id needs its own"
    if response.finish not in ("stop", "length"):
        return f"a response whose finish is {response.finish!r}, not 'stop' or 'length'"
    if (wrong := _outside(ids, "iu", 0, np.inf)) is not None:
        return f"a response with ids such as {reprlib.repr(wrong)}; they are whole numbers from 0"
    if (wrong := _outside(log_probabilities, "fiu", np.finfo(np.float64).min, _ROUNDING)) is not None:
        return (
            f"a response with log-probabilities such as {reprlib.repr(wrong)}; they are finite numbers of at most 0, "
            "of each id under the model at the sampling temperature"
        )
    return None


def _outside(values: Sequence[Any], kinds: str, least: float, most: float) -> Any:
    """The first of some values that is none from ``least`` to ``most``; all of them if they are of no such kind."""
    import numpy as np

    found = np.array(values, None if values else np.int64)
    if found.ndim != 1 or found.dtype.kind not in kinds:
        return values
    outside = found[~((least <= found) & (found <= most))]  # NaN is nowhere
    return outside[0].item() if outside.size else None
