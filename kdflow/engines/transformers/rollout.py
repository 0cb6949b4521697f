"""Responses of a Hugging Face model in this process: batched under a token budget, with a key-value cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
import torch
from torch import Tensor

from kdflow.contracts import EngineContext, ModelBytes, Options, Rollout, RolloutEngine, Sampling
from kdflow.engines.transformers.sampling import draw, uniforms

# A response by the number of its prompt and its own.
Key = tuple[int, int]


class TransformersRolloutOptions(Options):
    """Options of :class:`TransformersRollout`."""

    batch_tokens: int = pydantic.Field(default=16384, ge=1)
    """Tokens that the key-value cache of one batch may come to: responses times the longest prompt and response."""


class TransformersRollout(RolloutEngine):
    """Exact, on CPU or GPU; nothing is compiled, since shapes change with every token.

    The same numbers are drawn for a response whatever stands beside it. The logits are those of other batches but for
    rounding: in fp32 responses are the same in practice, in bf16 now and then one goes another way.

    It imports transformers when it is made, not when it is listed: that takes seconds.
    """

    name = "transformers"
    Options = TransformersRolloutOptions

    def __init__(self, model: str, options: TransformersRolloutOptions, context: EngineContext) -> None:
        from kdflow.models.head import probe_head
        from kdflow.models.loading import context_length, end_ids, load_model, load_tokenizer
        from kdflow.tokenizers.vocabulary import vocabulary_size

        super().__init__(model, options, context)
        self._batch_tokens = options.batch_tokens
        self._model = load_model(model, context.dtype, context.device, packed=False)
        self._model.train(False).requires_grad_(False)
        probe_head(self._model, "model that generates")
        self._valid_vocab = vocabulary_size(load_tokenizer(model))
        self._stop_ids, self._positions = end_ids(model), context_length(model) or sys.maxsize

    @torch.no_grad()
    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """``sampling.n`` responses to each prompt, prompt by prompt; none goes beyond the model's positions."""
        keys = [(number, sample) for number in range(len(prompt_ids)) for sample in range(sampling.n)]
        rollouts: dict[Key, Rollout] = {}
        for batch in self._batches(prompt_ids, keys, sampling):
            rollouts |= self._generate(prompt_ids, batch, sampling)
        return [rollouts[key] for key in keys]

    def _batches(self, prompts: Sequence[Sequence[int]], keys: list[Key], sampling: Sampling) -> Iterator[list[Key]]:
        """Responses to prompts of like lengths, the longest first, as many as the budget holds."""
        left = sorted(keys, key=lambda key: -len(prompts[key[0]]))
        while left:
            longest = len(prompts[left[0][0]])
            longest += sampling.room(longest, self._positions)
            rows = max(1, self._batch_tokens // longest)
            yield left[:rows]
            left = left[rows:]

    def _generate(self, prompts: Sequence[Sequence[int]], keys: list[Key], sampling: Sampling) -> dict[Key, Rollout]:
        """One batch: each prompt is read once, then all responses grow by a token at a time."""
        from transformers import DynamicCache

        device, stop_ids = self.context.device, self._stop_ids.union(sampling.stop_ids)
        numbers = list(dict.fromkeys(number for number, _ in keys))
        ids, mask = _left_padded([prompts[number] for number in numbers], device)
        cache = DynamicCache(config=self._model.config)
        logits = self._next_logits(ids, mask, cache)
        uniform = torch.stack([uniforms(prompts[number], sample, sampling) for number, sample in keys]).to(device)
        rows = torch.tensor([numbers.index(number) for number, _ in keys], device=device)
        cache.batch_select_indices(rows)
        logits, mask = logits[rows], mask[rows]
        found: dict[Key, list[tuple[int, float]]] = {key: [] for key in keys}
        room = {number: sampling.room(len(prompts[number]), self._positions) for number in numbers}
        growing = list(keys)
        for step in range(sampling.max_new_tokens):
            drawn, log_probabilities = draw(logits, uniform[:, step], sampling)
            tokens = drawn.tolist()
            for key, *token in zip(growing, tokens, log_probabilities.tolist(), strict=True):
                found[key].append((token[0], token[1]))
            going = [row for row, token in enumerate(tokens)
                     if token not in stop_ids and step + 1 < room[growing[row][0]]]  # fmt: skip
            if not going:
                break
            if len(going) < len(growing):  # those that have ended cost nothing more
                rows = torch.tensor(going, device=device)
                cache.batch_select_indices(rows)
                growing, drawn, mask, uniform = [growing[row] for row in going], drawn[rows], mask[rows], uniform[rows]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = self._next_logits(drawn[:, None], mask, cache)
        return {key: _rollout(tokens, stop_ids) for key, tokens in found.items()}

    def _next_logits(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits ``[n, V]`` of the token after ``ids [n, t]``, the last of the tokens that ``mask`` tells of."""
        from kdflow.models.head import read_head
        from kdflow.models.packed import decoder

        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        states = decoder(self._model)(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return read_head(self._model, self._valid_vocab).logits(states[:, -1])

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy new weights in place."""
        from kdflow.models.loading import copy_weights

        copy_weights(self._model, weights)

    @classmethod
    def device_bytes(cls, options: TransformersRolloutOptions, model: ModelBytes, asleep: bool = False) -> int:
        """The whole model, or nothing."""
        return 0 if asleep else model.weights

    def sleep(self) -> None:
        """Move the weights to host memory."""
        torch.nn.Module.to(self._model, "cpu")

    def wake(self) -> None:
        """Move them back."""
        torch.nn.Module.to(self._model, self.context.device)

    def close(self) -> None:
        """Drop the model."""
        del self._model


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[n, t]``: all prompts end in the last column."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    return ids, (torch.arange(longest, device=device) >= longest - lengths).long()


def _rollout(tokens: Sequence[tuple[int, float]], stop_ids: frozenset[int]) -> Rollout:
    ids, log_probabilities = zip(*tokens, strict=True)
    return Rollout(ids, log_probabilities, "stop" if ids[-1] in stop_ids else "length")
