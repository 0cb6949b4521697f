"""The forward hook that hands target rows out of an engine; SGLang itself installs it in its schedulers."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kdflow.engines.sglang import cuda_memory
from kdflow.engines.sglang.slots import CUDA, FAILED, HOST, HostMemory, Layout, Request, digest, weights

Hook = Callable[[Any, tuple[Any, ...], Any], None]


def exporter(config: Mapping[str, Any]) -> Hook:
    """What SGLang's server argument ``forward_hooks`` names; ``config["slots"]`` are those of each owner of slots.

    Of tensor-parallel ranks, which all hold the same hidden states, the first exports.
    """
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() != 0:
        return lambda module, inputs, output: None
    exporters = [Exporter(slots, owner) for owner, slots in enumerate(config["slots"])]

    def hook(*arguments: Any) -> None:
        for one in exporters:
            one(*arguments)

    return hook


class Exporter:
    """Copies the rows that an owner's requests ask for into its slots.

    A fault must not end the scheduler, which would take its message along: it is left in the slots' memory.
    """

    def __init__(self, config: Mapping[str, Any], owner: int = 0) -> None:
        self._owner = owner
        self._memory = HostMemory.open(Layout(**config["layout"]), config["path"])
        self._rows, state = self._memory.rows, HOST
        if config["cuda"] is not None:
            try:
                self._rows, state = _cuda_rows(self._memory.layout, config["cuda"]), CUDA
            except (RuntimeError, OSError) as error:
                self._memory.message = str(error)
            self._memory.page_lock(with_rows=state == HOST)
        self._weights: Tensor | None = None
        self._memory.state = state

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """After a forward pass of the module ``logits_processor``, whose inputs are ids, hidden states, head, batch."""
        try:
            self._export(inputs)
        except Exception as error:
            self._memory.message = f"{type(error).__name__}: {error}"
            self._memory.state = FAILED

    def _export(self, inputs: tuple[Any, ...]) -> None:
        if len(inputs) < 4:
            raise TypeError(f"logits_processor was called with {len(inputs)} positional arguments, not 4")
        ids, hidden, _, batch = inputs[:4]
        if not batch.rids or not batch.forward_mode.is_extend():
            return
        start, seen = 0, False
        for rid, length in zip(batch.rids, batch.extend_seq_lens_cpu, strict=True):
            request = Request.parse(rid)
            if request is not None and request.owner == self._owner:
                self._write(request, ids[start : start + length], hidden[start : start + length])
                seen = True
            start += length
        if seen:
            self._memory.count_pass()

    def _write(self, request: Request, ids: Tensor, hidden: Tensor) -> None:
        """Queue the copies on the pass's own stream: they are done once the engine has answered the request."""
        places = slice(request.first, request.first + request.count)
        positions, rows = self._memory.positions[request.slot, places], self._rows[request.slot, places]
        if hidden.dtype != rows.dtype:
            raise TypeError(f"the engine's hidden states are {hidden.dtype}, not {rows.dtype}")
        begin, end = int(positions[0]), int(positions[-1]) + 1
        if end <= len(hidden):  # else the engine read fewer tokens than it was sent, which the digest tells
            if end - begin == request.count:
                rows.copy_(hidden[begin:end], non_blocking=True)
            else:
                index = positions.to(hidden.device, non_blocking=True)
                if rows.device == hidden.device:
                    torch.index_select(hidden, 0, index, out=rows)
                else:
                    rows.copy_(hidden.index_select(0, index), non_blocking=True)
        if self._weights is None:
            self._weights = weights(self._memory.layout.tokens, ids.device)
        read = digest(ids, self._weights) if len(ids) <= len(self._weights) else self._weights[0] * 0
        self._memory.digests[request.slot, request.sequence].copy_(read, non_blocking=True)


def _cuda_rows(layout: Layout, config: Mapping[str, Any]) -> Tensor:
    """The student's CUDA memory, tried with a write."""
    device = torch.device("cuda", config["device"])
    size = layout.slots * layout.tokens * layout.row_bytes
    rows = cuda_memory.opened(base64.b64decode(config["handle"]), size, device).tensor(layout.torch_dtype)
    rows[:1].zero_()
    torch.cuda.synchronize(device)
    return rows.view(layout.slots, layout.tokens, layout.hidden_size)
