"""The forward hook that hands target rows out of an engine; SGLang itself installs it in its schedulers."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdflow.engines.sglang import cuda_runtime
from kdflow.engines.sglang.slots import CUDA, FAILED, HOST, UNUSED, HostMemory, Layout, Request, place_factors

Hook = Callable[[Any, tuple[Any, ...], Any], None]


def exporter(config: Mapping[str, Any]) -> Hook:
    """What SGLang's server argument ``forward_hooks`` names; ``config["slots"]`` are those of each owner of slots.

    Of tensor-parallel ranks, which all hold the same hidden states, the first exports, in the last stage of a pipeline.
    """
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() != 0 or not get_pp_group().is_last_rank:
        return lambda module, inputs, output: None
    exporters = [Exporter(slots, owner) for owner, slots in enumerate(config["slots"])]

    def hook(*arguments: Any) -> None:
        for one in exporters:
            one(*arguments)

    return hook


class _Read(NamedTuple):
    """A request in a pass, and which of the pass's tokens are its own."""

    request: Request
    start: int
    length: int


class Exporter:
    """Copies the rows that an owner's requests ask for into its slots.

    Requests whose rows lie one behind the other in a slot are served together, by a handful of kernels: a short prefill
    would wait for the many that each alone takes.

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
        if config["page_lock"]:
            self._memory.page_lock(with_rows=state == HOST)
        self._digests = torch.from_numpy(self._memory.digests)
        self._by_place: Tensor | None = None
        if self._memory.state not in (UNUSED, state):  # as another copy of the model has it, in a process of its own
            self._memory.message = "not all of the engine's processes can write into the student's CUDA memory"
            state = FAILED
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
        start, own = 0, list[_Read]()
        for rid, length in zip(batch.rids, batch.extend_seq_lens_cpu, strict=True):
            request = Request.parse(rid)
            if request is not None and request.owner == self._owner:
                own.append(_Read(request, start, length))
            start += length
        if own and hidden.dtype != self._rows.dtype:
            raise TypeError(f"the engine's hidden states are {hidden.dtype}, not {self._rows.dtype}")
        for run in self._runs(own, hidden.device):
            self._write(run, ids, hidden)
        if own:
            self._memory.count_pass()

    def _runs(self, own: list[_Read], device: torch.device) -> list[list[_Read]]:
        """Requests that follow one another in a slot; those that were not read as they were sent are left out.

        Their digests stay zero, which tells the student.
        """
        runs: list[list[_Read]] = []
        for one in sorted(own, key=lambda read: (read.request.slot, read.request.sequence)):
            request = one.request
            last = self._memory.positions[request.slot, request.first + request.count - 1]
            if last >= one.length or one.length > self._memory.layout.tokens:
                continue
            before = runs[-1][-1].request if runs else None
            # Rows go to the host straight from where they are: what is gathered before would be copied once more.
            if before and request.follows(before) and self._rows.device == device:
                runs[-1].append(one)
            else:
                runs.append([one])
        return runs

    def _write(self, run: list[_Read], ids: Tensor, hidden: Tensor) -> None:
        """Queue the copies on the pass's own stream: they are done once the engine has answered the requests."""
        first, last = run[0].request, run[-1].request
        places = slice(first.first, last.first + last.count)
        # In page-locked memory, of which a copy to the device does not wait for what is queued there. By numpy: torch
        # would wake its threads for so little.
        indices, rows = self._memory.indices[first.slot, places], self._rows[first.slot, places]
        starts = np.repeat([one.start for one in run], [one.request.count for one in run])
        positions = np.add(self._memory.positions[first.slot, places], starts, out=indices.numpy())
        if (np.diff(positions) == 1).all():
            rows.copy_(hidden[int(positions[0]) :][: len(positions)], non_blocking=True)
        else:
            index = indices.to(hidden.device, non_blocking=True)
            if rows.device == hidden.device:
                torch.index_select(hidden, 0, index, out=rows)
            else:
                rows.copy_(hidden.index_select(0, index), non_blocking=True)
        if self._by_place is None:
            self._by_place = torch.from_numpy(place_factors(self._memory.layout.tokens)).to(ids.device)
        read = digests([ids[one.start : one.start + one.length] for one in run], self._by_place)
        self._digests[first.slot, first.sequence : last.sequence + 1].copy_(read, non_blocking=True)


def digests(sequences: Sequence[Tensor], by_place: Tensor) -> Tensor:
    """The digest of the ids ``[t]`` of each sequence, int64 ``[n]``: a few kernels, as many as one alone would take."""
    places = torch.cat([by_place[: len(ids)] for ids in sequences])
    sums = ((torch.cat(list(sequences)).long() + 1) * places).cumsum(0)
    # Where sequences end is told by views, not by a tensor: its copy to the device would wait for what is queued there.
    until = torch.stack([sums[last - 1] for last in itertools.accumulate(map(len, sequences))])
    return until.diff(prepend=until.new_zeros(1))


def _cuda_rows(layout: Layout, config: Mapping[str, Any]) -> Tensor:
    """The student's CUDA memory, tried with a write."""
    device = torch.device("cuda", config["device"])
    size = layout.slots * layout.tokens * layout.row_bytes
    rows = cuda_runtime.opened(base64.b64decode(config["handle"]), size, device).tensor(layout.torch_dtype)
    rows[:1].zero_()
    torch.cuda.synchronize(device)
    return rows.view(layout.slots, layout.tokens, layout.hidden_size)
