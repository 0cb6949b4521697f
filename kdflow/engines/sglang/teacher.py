"""The teacher that SGLang runs in a process of its own: prefill only, and its hidden states in the student's memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdflow.contracts import (
    EngineContext,
    Head,
    KdflowError,
    Lease,
    ModelBytes,
    ModelSpec,
    TeacherEngine,
    TokenBatch,
    Transport,
)
from kdflow.engines.sglang.handover import Handover
from kdflow.engines.sglang.options import SGLangOptions
from kdflow.engines.sglang.process import persevere, starting
from kdflow.engines.sglang.slots import CUDA, FAILED, UNUSED, Layout, Request, Slots, digest, weights
from kdflow.engines.sglang.team import form_team
from kdflow.extras import require

_log = logging.getLogger("kdflow")

# One is filled while the other is read.
_SLOTS = 2
_MODULE = "logits_processor"
_HOOK = "kdflow.engines.sglang.exporter:exporter"

Asked = list[tuple[list[int], Request]]


class SGLangTeacherOptions(SGLangOptions):
    """Options of :class:`SGLangTeacher`."""

    placement: Literal["colocated", "dedicated"] = "colocated"
    """``colocated``: on the GPUs of the ranks that share it. ``dedicated``: on further GPUs of the machine, where it
    scores the next micro-batch while the student learns from this one."""
    quantization: str | None = None
    """How the weights are held, by SGLang's name for it, such as fp8; null: as the model's files say. A teacher that
    follows the student cannot be quantized."""


class SGLangTeacher(TeacherEngine):
    """``sglang.Engine`` in a child process, fed with token ids.

    An engine that dies, or does not answer in time, is started again and the micro-batch sent again.
    """

    name = "sglang"
    paper = "https://arxiv.org/abs/2312.07104"
    Options = SGLangTeacherOptions

    def __init__(self, model: str, options: SGLangTeacherOptions, context: EngineContext) -> None:
        from kdflow.models.fetch import resolve
        from kdflow.models.head import HeadAndEmbeddings

        require("sglang", "sglang", "teacher.engine 'sglang'")
        if context.sleeps and options.placement == "dedicated":
            raise KdflowError(
                "teacher.sleep: an engine with GPUs of its own takes no memory from a student; leave it out"
            )
        super().__init__(model, options, context)
        self._timeout, self._overlaps = options.timeout, options.placement == "dedicated"
        self._quantization = options.quantization
        self._team = form_team(options.gpus, context.device, "teacher.engine 'sglang'", self._overlaps)
        self._model = HeadAndEmbeddings(model, context.dtype, context.device)
        self._head = self._model.head
        vocabulary, hidden_size = self._head.weight.shape
        self._spec = ModelSpec(hidden_size, vocabulary)
        layout = Layout(_SLOTS, context.max_tokens, hidden_size, str(context.dtype).removeprefix("torch."))
        self._slots = Slots(layout, context.device)
        self._weights = weights(context.max_tokens, torch.device("cpu"))
        self._serial = itertools.count()
        self._engine = options.process(self._arguments(resolve(model), options), context)
        self._newest = Handover(self._team, self._engine, context.device)
        self._version = self._team.lead(self._first_start)
        found = self.transport
        _log.info(
            f"rows leave sglang {self._version} by {found.name}: {found.copies_per_row} copies and "
            f"{found.bytes_per_row} bytes a row; {layout.slots} slots of {layout.tokens * layout.row_bytes:,} bytes"
        )

    def _first_start(self) -> str:
        """Start the engine; its version."""
        slot = self._slots.acquire(self._timeout)
        with starting("teacher.engine 'sglang'", self.model, self.close):
            self._start(slot)
        self._slots.release(slot)
        return self._engine.version

    @property
    def overlaps(self) -> bool:
        """Whether it has GPUs of its own."""
        return self._overlaps

    @classmethod
    def device_bytes(cls, options: SGLangTeacherOptions, model: ModelBytes, asleep: bool = False) -> int:
        """The head and the slots that rows arrive in, beside the student; and the engine's pool, where it is there."""
        beside = model.head + _SLOTS * model.max_tokens * model.row
        if asleep or options.placement == "dedicated":
            return beside
        return beside + options.pool(model, options.gpus * _cache_tokens(model.max_tokens))

    def _arguments(self, path: str, options: SGLangTeacherOptions) -> dict[str, Any]:
        """Of ``sglang.Engine``: prefill only, every token of a sequence in one pass, nothing from a cache."""
        config = {"slots": self._team.ask(self._slots.config, lambda of_all: [of_all] * len(of_all))}
        hook = {"name": "kdflow", "target_modules": [_MODULE], "hook_factory": _HOOK, "config": config}
        return {
            **options.arguments(path, self.context, self._team.first_gpu),
            "disable_radix_cache": True,
            "chunked_prefill_size": -1,
            "disable_cuda_graph": True,
            "sampling_backend": "pytorch",
            # Of each rank's micro-batch.
            "max_total_tokens": self._team.size * _cache_tokens(self.context.max_tokens),
            "quantization": options.quantization,
            "forward_hooks": [hook],
        }

    @property
    def head(self) -> Head:
        """The head as the model's files hold it, or the newest weights."""
        return self._head

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes."""
        return self._spec

    @property
    def transport(self) -> Transport:
        """How rows arrive, as the engine's first pass has found out.

        Counted are the copies of target tokens in one run; through page-locked memory, scattered ones take one more.
        """
        direct = self._slots.host.state == CUDA or self.context.device.type == "cpu"
        name = "cuda_ipc" if self._slots.host.state == CUDA else "shared_memory"
        return Transport(name, 1 if direct else 2, self._slots.layout.row_bytes)

    @cached_property
    def _embeddings(self) -> nn.Module:
        found = self._model.load_embeddings()
        self._model.update(self._newest.tensors())
        return found

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The input embeddings of ``ids [n]``, ``[n, H]``, of the model's files or the newest weights."""
        embedded: Tensor = self._embeddings(ids)
        return embedded

    def _start(self, slot: int) -> None:
        """Start the engine, and try with a free slot what it exports."""
        memory = self._slots.host
        memory.state, memory.message = UNUSED, ""
        self._engine.start()
        self._version = self._engine.version
        self._newest.restore()
        self._probe(slot)

    def probe(self) -> float:
        """Recompute next-token log-probabilities of a prompt from exported rows and the head.

        Returns:
            Their difference from the engine's own, as a share of their norm.

        Raises:
            KdflowError: they differ, no rows have come, or they are of other tokens.
        """
        slot = self._slots.acquire(self._timeout)
        try:
            return self._probe(slot)
        finally:
            self._slots.release(slot)

    def _probe(self, slot: int) -> float:
        from kdflow.models.packed import probe_ids

        ids = probe_ids(self._spec.vocab_size, torch.device("cpu"))
        sequence = _Sequence(ids, torch.arange(len(ids) - 1))
        (request,) = self._expect(slot, [sequence])
        told = self._engine.ask("log_probabilities", sequence.numbers, request.rid(next(self._serial)))
        self._require_export()
        self._require_digests(slot, [sequence])
        rows, tokens, expected = (
            torch.tensor(column, device=self.context.device) for column in zip(*told, strict=True)
        )
        logits = self._head.logits(self._rows(slot, len(sequence.targets)))
        found = logits.log_softmax(-1)[rows, tokens]
        difference = float((found - expected).norm() / expected.norm())
        tolerance = 2e-2 if self.context.dtype.itemsize < 4 else 1e-4
        if not difference <= tolerance:
            raise KdflowError(
                f"teacher {self.model}: log-probabilities recomputed from the hidden states of sglang "
                f"{self._engine.version} and the head in the model's files, or in its new weights, differ from the "
                f"engine's own by {difference:.3g} of their norm, at most {tolerance:g} expected. Its head does more "
                "than weight, bias, scale and soft-capping, or the engine changes it, or did not take the weights; use "
                "teacher.engine.name=transformers"
            )
        _log.info(f"log-probabilities from the exported rows differ by {difference:.2g} from sglang's own")
        return difference

    def _require_export(self) -> None:
        """Check that the hook has run since the engine was started."""
        memory, version = self._slots.host, self._version
        if memory.state == FAILED:
            raise KdflowError(f"the hook in sglang {version} that exports hidden states failed: {memory.message}")
        if memory.state == UNUSED or memory.passes == 0:
            raise KdflowError(
                f"no hidden states came out of sglang {version}: its model has no module '{_MODULE}', or it calls no "
                "forward hooks. kdflow is tested with sglang 0.5.17 and 0.5.21; use one of these, or "
                "teacher.engine.name=transformers"
            )
        self._slots.settle()

    def _require_digests(self, slot: int, sequences: Sequence[_Sequence]) -> None:
        """Check that the engine has read the very tokens that it was sent."""
        expected = torch.stack([digest(sequence.ids, self._weights) for sequence in sequences])
        if not torch.equal(self._slots.host.digests[slot, : len(sequences)], expected):
            raise KdflowError(
                f"sglang {self._version} read other tokens than it was sent: the digests of their ids differ. "
                "Report it, and use teacher.engine.name=transformers"
            )

    def _expect(self, slot: int, sequences: Sequence[_Sequence]) -> list[Request]:
        """Write into a slot which rows are wanted; the requests that bring them, in the order of the sequences."""
        memory, requests, first = self._slots.host, [], 0
        memory.digests[slot, : len(sequences)] = 0
        for number, sequence in enumerate(sequences):
            count = len(sequence.targets)
            memory.positions[slot, first : first + count] = sequence.targets
            requests.append(Request(slot, number, first, count, self._team.number))
            first += count
        return requests

    def _rows(self, slot: int, count: int) -> Tensor:
        """The first rows of a slot, on the student's device."""
        return self._slots.rows[slot, :count].to(self.context.device, non_blocking=True)

    def score(self, batch: TokenBatch) -> Lease:
        """Prefill the sequences that have targets, the longest first; the rows lie in a slot until they are released.

        Raises:
            KdflowError: the engine failed three times in a row, read other tokens than it was sent, or the micro-batch
                does not fit into a slot.
        """
        host, limit = batch.on_host, self._slots.layout.tokens
        if len(host.input_ids) > limit:
            raise KdflowError(f"a micro-batch of {len(host.input_ids)} tokens exceeds the {limit} that a slot holds")
        sequences = [_Sequence(ids, targets) for ids, targets in host.sequences()]
        slot = self._slots.acquire(self._timeout)
        try:
            requests = self._expect(slot, sequences)
            asked = [(one.numbers, request) for one, request in zip(sequences, requests, strict=True)]
            self._team.ask(asked, partial(self._prefill, slot, sequences))
            if sequences:
                self._require_export()
                self._require_digests(slot, sequences)
        except BaseException:
            self._slots.release(slot)
            raise
        return Lease(self._rows(slot, len(host.targets)), batch.digest, lambda: self._slots.release(slot))

    def _prefill(self, slot: int, sequences: Sequence[_Sequence], asked: list[Asked]) -> list[None]:
        """Send the sequences of all ranks; if the engine dies of it, start it again and send them again."""
        longest_first = sorted(itertools.chain(*asked), key=lambda one: -len(one[0]))

        def send() -> None:
            rids = [request.rid(next(self._serial)) for _, request in longest_first]
            self._engine.ask("prefill", [ids for ids, _ in longest_first], rids)

        def start() -> None:
            self._start(slot)
            self._expect(slot, sequences)  # again: the probe has used the slot

        if longest_first:
            self._persevere(start, send)
        return [None] * len(asked)

    def _with_slot(self, work: Callable[[int], None]) -> None:
        """Let the engine do ``work``, which is given a free slot; if it dies of it, start it again."""
        slot = self._slots.acquire(self._timeout)
        try:
            self._persevere(lambda: self._start(slot), lambda: work(slot))
        finally:
            self._slots.release(slot)

    def _persevere(self, start: Callable[[], None], work: Callable[[], None]) -> None:
        persevere(self._engine, start, work, "teacher", "teacher.engine.timeout")

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Hand new weights to the engine, in its dtype, and to head and embeddings; then probe them.

        Raises:
            KdflowError: the engine's are quantized, the new ones are another model's, the engine failed three times in
                a row, or what it computes is not of these weights.
        """
        from kdflow.models.loading import as_saved

        if self._quantization is not None:
            raise KdflowError(
                f"teacher.engine.quantization: an engine that holds its weights in {self._quantization} takes no new "
                "ones; leave it out for a teacher that follows the student"
            )
        self._newest.write(as_saved(self._model.model, weights), self.context.dtype)
        self._model.update(self._newest.tensors())
        self._team.lead(lambda: self._with_slot(self._hand_over))

    def _hand_over(self, slot: int) -> None:
        """Give the engine what was written, and try with a free slot what it exports."""
        self._newest.finish()
        self._probe(slot)

    def sleep(self) -> None:
        """Give the engine's weights, keys and values back to the device; rows that are lent stay where they are."""
        self._team.lead(self._engine.sleep)

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        self._team.lead(lambda: self._with_slot(lambda slot: self._engine.wake()))

    def close(self) -> None:
        """End the engine's processes and free the slots."""
        self._engine.close()
        self._slots.close()
        self._newest.close()


def _cache_tokens(max_tokens: int) -> int:
    """Tokens whose keys and values fit: those of a micro-batch, and a new one of each of its sequences."""
    return 2 * max_tokens + 1024


@dataclass(frozen=True)
class _Sequence:
    """Ids ``[t]`` and the wanted positions among them, ascending, ``[n]``; both on the host."""

    ids: Tensor
    targets: Tensor

    @property
    def numbers(self) -> list[int]:
        """The ids as SGLang takes them."""
        numbers: list[int] = self.ids.numpy().tolist()
        return numbers
