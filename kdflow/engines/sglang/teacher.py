"""The teacher that SGLang runs in a process of its own: prefill only, and its hidden states in the student's memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from kdflow.contracts import (
    EngineContext,
    Head,
    KdflowError,
    Lease,
    ModelBytes,
    TeacherEngine,
    TokenBatch,
    Transport,
)
from kdflow.engines.sglang import cuda_runtime
from kdflow.engines.sglang.handover import Handover
from kdflow.engines.sglang.options import SGLangOptions
from kdflow.engines.sglang.rows import MODULE, Asked, Rows
from kdflow.engines.sglang.slots import Layout
from kdflow.engines.sglang.supervisor import Supervisor
from kdflow.engines.sglang.team import form_team
from kdflow.extras import require

_log = logging.getLogger("kdflow")

# Of an engine with GPUs of its own: one is filled while the other is read.
_SLOTS = 2
# Of one on the student's GPU, which would otherwise change hands for each micro-batch: all are filled, then all read.
_TOGETHER = 4
# Tokens of a pass, where micro-batches are no larger: each pass costs some milliseconds in which the GPU waits.
_PASS = 32768
# Seconds that the student may keep a slot: it may compile, and learn from all that was lent, before it gives one back.
_LENT = 3600.0
_HOOK = "kdflow.engines.sglang.exporter:exporter"

T = TypeVar("T")


class SGLangTeacherOptions(SGLangOptions):
    """Options of :class:`SGLangTeacher`."""

    operational = SGLangOptions.operational | {"placement"}

    placement: Literal["colocated", "dedicated"] = "colocated"
    """``dedicated``: on further GPUs of the machine, where it scores the next micro-batch while the student learns from
    this one. ``colocated``: on the GPUs of the ranks that share it; in turns with the student, for four micro-batches
    each, but under CUDA's multi-process service, which lets it work beside the student here, too."""
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
        from kdflow.models.packed import probe_ids

        if context.sleeps and options.placement == "dedicated":
            raise KdflowError(
                "teacher.sleep: an engine with GPUs of its own takes no memory from a student; leave it out"
            )
        self.require_installed()
        super().__init__(model, options, context)
        self._dedicated = options.placement == "dedicated"
        self._team = form_team(
            options.gpus, context.device, "teacher.engine 'sglang'", options.patience, self._dedicated
        )
        self._model = HeadAndEmbeddings(model, context.dtype, context.device)
        self._head = self._model.head
        vocabulary, hidden_size = self._head.weight.shape
        self._probed = probe_ids(vocabulary, torch.device("cpu")).numpy()
        tokens = max(context.max_tokens, len(self._probed))
        slots, dtype = _SLOTS if self.overlaps else _TOGETHER, str(context.dtype).removeprefix("torch.")
        layout = Layout(slots, tokens, hidden_size, dtype)
        self._rows = Rows(layout, context.device, self._team.number)
        self._slots = self._rows.slots
        self._serial = itertools.count()
        self._engine = options.process(self._arguments(resolve(model), options), context)
        self._newest = Handover(self._team, self._engine, context.device)
        self._supervisor = Supervisor(self._engine, self._newest, "teacher.engine", self._rows.forget_hook)
        try:
            self._version = self._team.lead(lambda: self._with_slot(self._begin))
        except BaseException:
            self.close()
            raise
        found = self.transport
        _log.info(
            f"rows leave sglang {self._version} by {found.name}: {found.copies_per_row} copies and "
            f"{found.bytes_per_row} bytes a row; {layout.slots} slots of {layout.tokens * layout.row_bytes:,} bytes"
        )

    def _begin(self, slot: int) -> str:
        """Start the engine, and try with a free slot what it exports; its version."""
        self._supervisor.begin(self.model, lambda: self._probe(slot))
        return self._engine.version

    @cached_property
    def overlaps(self) -> bool:
        """Where it has GPUs of its own, or the student's runs kernels of both: elsewhere time slices cost a tenth."""
        device = self.context.device
        mixed = device.type == "cuda" and not self.context.sleeps and cuda_runtime.mixes_kernels(device)
        return self._dedicated or mixed

    @property
    def at_once(self) -> int:
        """As many as there are slots, where it takes turns with the student."""
        return 1 if self.overlaps else _TOGETHER

    @classmethod
    def require_installed(cls) -> None:
        """Check for sglang."""
        require("sglang", "sglang", "teacher.engine 'sglang'")

    @classmethod
    def require_updatable(cls, options: SGLangTeacherOptions) -> None:
        """Check for quantized weights and for several copies of the model, which take no new weights."""
        if options.quantization is not None:
            raise KdflowError(
                f"quantization: an engine that holds its weights in {options.quantization} takes no new ones; leave it "
                "out for a teacher that follows the student"
            )
        options.require_updatable()

    @classmethod
    def device_bytes(cls, options: SGLangTeacherOptions, model: ModelBytes, asleep: bool = False) -> int:
        """The head and the slots that rows arrive in, beside the student; and the engine's pool, where it is there."""
        dedicated = options.placement == "dedicated"
        slots = _SLOTS if dedicated else _TOGETHER
        beside = model.head + slots * model.max_tokens * model.row
        if asleep or dedicated:
            return beside
        return beside + options.pool(model, _cache_tokens(options.gpus, slots, model.max_tokens))

    def _arguments(self, path: str, options: SGLangTeacherOptions) -> dict[str, Any]:
        """Of ``sglang.Engine``: prefill only, every token of a sequence in one pass, nothing from a cache."""
        tokens = _cache_tokens(self._team.size, self._slots.layout.slots, self.context.max_tokens)
        config = {"slots": self._team.ask(self._slots.config, lambda of_all: [of_all] * len(of_all))}
        hook = {"name": "kdflow", "target_modules": [MODULE], "hook_factory": _HOOK, "config": config}
        return {
            **options.arguments(path, self.context, self._team.first_gpu),
            "disable_radix_cache": True,
            "chunked_prefill_size": -1,
            "disable_cuda_graph": True,
            "sampling_backend": "pytorch",
            "max_total_tokens": tokens,
            # What a pass costs the host hardly grows with it. Not all micro-batches of the whole team, whose
            # activations would have no bound. SGLang begins another where exactly as many are left as a sequence has.
            "max_prefill_tokens": max(self.context.max_tokens, _PASS) + 1,
            "quantization": options.quantization,
            "forward_hooks": [hook],
        }

    @property
    def head(self) -> Head:
        """The head as the model's files hold it, or the newest weights."""
        return self._head

    @property
    def transport(self) -> Transport:
        """How rows arrive, as the engine's first pass has found out."""
        return self._rows.transport

    @property
    def restarts(self) -> int:
        """How often this rank had to start the engine again."""
        return self._supervisor.restarts

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

    def probe(self) -> float:
        """Recompute next-token log-probabilities of a prompt from exported rows and the head.

        Returns:
            Their difference from the engine's own, as a share of their norm.

        Raises:
            KdflowError: they differ, no rows have come, or they are of other tokens.
        """
        return self._with_slot(self._probe)

    def _probe(self, slot: int) -> float:
        (asked,) = self._rows.expect(slot, [(self._probed, np.arange(len(self._probed) - 1))])
        told = self._engine.ask("log_probabilities", asked.ids, asked.request.rid(next(self._serial)))
        logits = self._head.logits(self._rows.take(slot, self._engine.version))
        numbers, tokens, expected = (
            torch.tensor(column, device=self.context.device) for column in zip(*told, strict=True)
        )
        found = logits.log_softmax(-1)[numbers, tokens]
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
        self.parity = difference
        _log.info(f"log-probabilities from the exported rows differ by {difference:.2g} from sglang's own")
        return difference

    def score(self, batch: TokenBatch) -> Lease:
        """Prefill the sequences that have targets, the longest first; their rows lie in a slot until it is released.

        Raises:
            KdflowError: the engine failed three times in a row, read other tokens than it was sent, or the micro-batch
                does not fit into a slot.
        """
        (lease,) = self.score_all([batch])
        return lease

    def score_all(self, batches: Sequence[TokenBatch]) -> list[Lease]:
        """:meth:`score` of each, of which the engine is asked once; as many slots must be free, or become so."""
        limit = self._slots.layout.tokens
        for batch in batches:
            if (count := len(batch.on_host.input_ids)) > limit:
                raise KdflowError(f"a micro-batch of {count} tokens exceeds the {limit} that a slot holds")
        slots = list[int]()

        def expect() -> list[list[Asked]]:
            return [
                self._rows.expect(slot, list(batch.on_host.sequences()))
                for slot, batch in zip(slots, batches, strict=True)
            ]

        try:
            for _ in batches:
                slots.append(self._slots.acquire(_LENT))
            self._team.ask(expect(), partial(self._prefill, slots[0], expect))
            rows = [self._rows.take(slot, self._version) for slot in slots]
        except BaseException:
            for slot in slots:
                self._slots.release(slot)
            raise
        return [
            Lease(lent, batch.digest, partial(self._slots.release, slot))
            for lent, batch, slot in zip(rows, batches, slots, strict=True)
        ]

    def _prefill(self, slot: int, expect: Callable[[], object], asked: list[list[list[Asked]]]) -> list[None]:
        """Send the micro-batches of all ranks; if the engine dies of it, start it again and send them again.

        In the order of the micro-batches, and of all ranks; in each the longest sequence first. Sorted as one,
        they would fill passes worse than they were packed, and the rows of each would come in many small copies.
        """
        sent = [
            one
            for together in zip(*asked, strict=True)
            for one in sorted(itertools.chain(*together), key=lambda one: -one.ids.length)
        ]

        def send() -> None:
            rids = [one.request.rid(next(self._serial)) for one in sent]
            self._engine.ask("prefill", [one.ids for one in sent], rids)

        def started() -> None:
            self._probe(slot)
            expect()  # again: the probe has used the slot

        if sent:
            self._supervisor.run(send, started)
        return [None] * len(asked)

    def _with_slot(self, work: Callable[[int], T]) -> T:
        """What ``work`` gives, which is given a free slot."""
        slot = self._slots.acquire(_LENT)
        try:
            return work(slot)
        finally:
            self._slots.release(slot)

    def update_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Hand new weights to the engine, in its dtype, and to head and embeddings; then probe them.

        Raises:
            KdflowError: the engine's are quantized, it has several copies of the model, the new ones are another
                model's, the engine failed three times in a row, or what it computes is not of these weights.
        """
        from kdflow.models.loading import as_saved

        self.require_updatable(self.options)
        self._newest.write(as_saved(self._model.model, weights), self.context.dtype)
        self._model.update(self._newest.tensors())
        self._team.lead(lambda: self._with_slot(self._hand_over))

    def _hand_over(self, slot: int) -> None:
        """Give the engine what was written, and try with a free slot what it exports."""

        def work() -> None:
            self._newest.finish()
            self._probe(slot)

        self._supervisor.run(work)

    def sleep(self) -> None:
        """Give the engine's weights, keys and values back to the device; rows that are lent stay where they are."""
        self._team.lead(self._supervisor.sleep)

    def wake(self) -> None:
        """Undo :meth:`sleep`."""
        self._team.lead(lambda: self._with_slot(self._wake))

    def _wake(self, slot: int) -> None:
        self._supervisor.wake(lambda: self._probe(slot))

    def close(self) -> None:
        """End the engine's processes and free the slots."""
        self._supervisor.close()
        self._slots.close()


def _cache_tokens(ranks: int, slots: int, max_tokens: int) -> int:
    """Tokens whose keys and values fit: those of all slots, or of two passes, one of which is being prepared; and a new
    one of each of their sequences."""
    return min(ranks * slots * max_tokens, 2 * max(max_tokens, _PASS)) + ranks * 1024
