"""The student's copy that SGLang runs in a process of its own, and that writes its responses."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal

import pydantic
from torch import Tensor

from kdflow.contracts import EngineContext, KdflowError, ModelBytes, Rollout, RolloutEngine, Sampling
from kdflow.engines.sglang.handover import Handover
from kdflow.engines.sglang.options import SGLangOptions
from kdflow.engines.sglang.supervisor import Supervisor
from kdflow.engines.sglang.team import form_team
from kdflow.engines.sglang.weights import BUCKET
from kdflow.extras import require

_log = logging.getLogger("kdflow")

Answer = tuple[list[int], list[float], Literal["stop", "length"]]


class SGLangRolloutOptions(SGLangOptions):
    """Options of :class:`SGLangRollout`."""

    operational = SGLangOptions.operational | {"cache_tokens"}

    cache_tokens: int | None = pydantic.Field(default=None, ge=1)
    """Tokens whose keys and values are kept, of all responses that are written at a time; null: SGLang decides."""


class SGLangRollout(RolloutEngine):
    """``sglang.Engine`` in a child process, fed with token ids; batches, prefix cache and CUDA graphs are SGLang's.

    What is drawn cannot be repeated, since SGLang takes no seed for a response on every device: with the same seed a
    run draws other responses, unless the temperature is 0. An engine that dies, or does not answer in time, is started
    again, gets the newest weights, and is asked again.
    """

    name = "sglang"
    paper = "https://arxiv.org/abs/2312.07104"
    Options = SGLangRolloutOptions

    def __init__(self, model: str, options: SGLangRolloutOptions, context: EngineContext) -> None:
        from kdflow.models.fetch import resolve
        from kdflow.models.head import read_head
        from kdflow.models.loading import context_length, end_ids, load_tokenizer, meta_model
        from kdflow.tokenizers.vocabulary import vocabulary_size

        self.require_installed()
        super().__init__(model, options, context)
        self._team = form_team(options.gpus, context.device, "rollout.engine 'sglang'", options.patience)
        self._stop_ids, self._positions = end_ids(model), context_length(model) or sys.maxsize
        self._model = meta_model(model, context.dtype)
        # Rows of the head that are no tokens: SGLang would draw them.
        self._padding = range(vocabulary_size(load_tokenizer(model)), read_head(self._model).vocab_size)
        self._engine = options.process(self._arguments(resolve(model), options), context)
        self._weights = Handover(self._team, self._engine, context.device)
        self._supervisor = Supervisor(self._engine, self._weights, "rollout.engine")
        try:
            self._team.lead(lambda: self._supervisor.begin(model))
        except BaseException:
            self.close()
            raise

    def _arguments(self, path: str, options: SGLangRolloutOptions) -> dict[str, Any]:
        """Of ``sglang.Engine``, whose graphs for decoding stay on."""
        arguments: dict[str, Any] = options.arguments(path, self.context, self._team.first_gpu)
        if options.cache_tokens is not None:
            arguments["max_total_tokens"] = options.cache_tokens
        if self.context.device.type == "cpu":
            arguments["sampling_backend"] = "pytorch"
        return arguments

    @property
    def restarts(self) -> int:
        """How often this rank had to start the engine again."""
        return self._supervisor.restarts

    @classmethod
    def require_installed(cls) -> None:
        """Check for sglang."""
        require("sglang", "sglang", "rollout.engine 'sglang'")

    @classmethod
    def device_bytes(cls, options: SGLangRolloutOptions, model: ModelBytes, asleep: bool = False) -> int:
        """The bucket that new weights come through, which is the student's, and the engine's pool while it is awake."""
        bucket = min(model.weights, max(BUCKET, model.head))
        return bucket if asleep else bucket + options.pool(model, options.cache_tokens)

    @classmethod
    def require_updatable(cls, options: SGLangRolloutOptions) -> None:
        """Check for several copies of the model, which take no new weights."""
        options.require_updatable()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """``sampling.n`` responses to each prompt, prompt by prompt; none goes beyond the model's positions.

        Raises:
            KdflowError: the engine's cache has no room for a prompt and its response, the engine refuses one, or it
                failed three times in a row.
        """
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": sorted(self._stop_ids.union(sampling.stop_ids)),
            **({"logit_bias": {str(index): -1e9 for index in self._padding}} if self._padding else {}),
        }
        ids = [list(map(int, prompt)) for prompt in prompt_ids for _ in range(sampling.n)]
        asked = [
            (prompt, {**parameters, "max_new_tokens": sampling.room(len(prompt), self._positions)}) for prompt in ids
        ]
        told = self._team.ask(asked, self._generate)
        return [Rollout(tuple(tokens), tuple(values), finish) for tokens, values, finish in told]

    def _generate(self, asked: list[list[tuple[list[int], dict[str, Any]]]]) -> list[list[Answer]]:
        """What the engine tells of the prompts of each rank, with their sampling parameters, all asked at once."""
        prompts = list(chain(*asked))

        def ask() -> list[Answer]:
            self._require_room(prompts)  # each time: one that was started again may have found less memory
            answers: list[Answer] = self._engine.ask("generate", *map(list, zip(*prompts, strict=True)))
            return answers

        told = iter(self._supervisor.run(ask) if prompts else [])
        return [list(islice(told, len(of_rank))) for of_rank in asked]

    def _require_room(self, prompts: list[tuple[list[int], dict[str, Any]]]) -> None:
        """Check that the engine's cache holds each prompt and its response: SGLang would end it early, and not say so.

        Raises:
            KdflowError: it does not; tells of the one that needs most.
        """
        if (cache := self._engine.cache) is None:
            return
        lengths = ((len(ids), int(parameters["max_new_tokens"])) for ids, parameters in prompts)
        needed, prompt, new = max((cache.needed(*one), *one) for one in lengths)
        if needed > cache.tokens:
            raise KdflowError(
                f"rollout.engine 'sglang' has a cache of {cache.tokens} tokens, and {needed} are needed: {prompt} of a "
                f"prompt, {new} of its response and {needed - prompt - new} that SGLang keeps free. Raise its "
                "cache_tokens, or its memory_fraction where the memory has no room for them, or lower max_new_tokens"
            )

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Hand new weights to the engine, in its dtype, and forget what its cache holds of the old ones.

        Raises:
            KdflowError: it has several copies of the model, or it failed three times in a row.
        """
        from kdflow.models.loading import as_saved

        self.require_updatable(self.options)
        self._weights.write(as_saved(self._model, weights), self.context.dtype)
        self._team.lead(lambda: self._supervisor.run(self._weights.finish))

    def sleep(self) -> None:
        """Give weights, keys and values back to the device; the host keeps the weights."""
        self._team.lead(self._supervisor.sleep)

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        self._team.lead(self._supervisor.wake)

    def close(self) -> None:
        """End the engine's processes and free the weights."""
        self._supervisor.close()
