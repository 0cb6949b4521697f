"""Weights through CUDA memory that another process opens, and what is kept of them on the host."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor

from kdflow.engines.sglang import weights as module
from kdflow.engines.sglang.weights import Bucket, SharedWeights, load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPE = torch.bfloat16


class Holder:
    """Has what SGLang's models have: a function that copies weights."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.held |= {name: tensor.clone() for name, tensor in weights}


def schedule(connection: Connection[Any, Any]) -> None:
    """What a scheduler does with buckets; answers with what it has got."""
    while (bucket := connection.recv()) is not None:
        model = Holder()
        load(model, [("kdflow", bucket.told().cuda())])
        connection.send(
            {name: (tensor.device.type, tensor.float().cpu().numpy()) for name, tensor in model.held.items()}
        )


def test_every_bucket_arrives_in_another_process_and_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET", 4096)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"wide": (48, 64), "odd": (7,), "a": (3, 5), "b": (40, 30), "c": (1,)}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=schedule, args=(theirs,), daemon=True)
    process.start()
    shared, told = SharedWeights(torch.device("cuda", 0)), list[tuple[Bucket, bool, bool]]()
    arrived: dict[str, Any] = {}

    def take(bucket: Bucket, first: bool, last: bool) -> bool:
        told.append((bucket, first, last))
        ours.send(bucket)
        arrived.update(ours.recv())
        return True

    for number in range(3):
        new = {name: torch.randn(shape, device="cuda", generator=generator) for name, shape in shapes.items()}
        arrived.clear()
        told.clear()
        assert shared.write(iter(new.items()), DTYPE, take) == (number > 0), "the first go to the host"
        if number > 0:
            assert [first for _, first, _ in told] == [True, *[False] * (len(told) - 1)]
            assert [last for _, _, last in told] == [*[False] * (len(told) - 1), True]
            assert len(told) > 1
            assert {device for device, _ in arrived.values()} == {"cuda"}
        for found in (arrived, by_host(shared)) if number > 0 else (by_host(shared),):
            assert list(found) == list(new)
            for name, tensor in new.items():
                expected = tensor.to(DTYPE).float().cpu()
                torch.testing.assert_close(torch.from_numpy(found[name][1]), expected, rtol=0, atol=0)
    ours.send(None)
    process.join()
    shared.close()


def test_an_engine_that_takes_no_more_costs_no_weight_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET", 64)
    shared = SharedWeights(torch.device("cuda", 0))
    for value in (1.0, 2.0):
        weights = {name: torch.full((100,), value, device="cuda") for name in "abc"}
        assert not shared.write(iter(weights.items()), DTYPE, lambda *_: False)
    assert all((values == 2.0).all() for _, values in by_host(shared).values())
    shared.close()


def by_host(shared: SharedWeights) -> dict[str, Any]:
    model = Holder()
    for bucket in shared.buckets():
        load(model, [("kdflow", bucket.told())])
    return {name: (tensor.device.type, tensor.float().numpy()) for name, tensor in model.held.items()}
