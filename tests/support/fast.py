"""Discovery, once for a whole module of tests: what is installed does not change while they run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import pytest
import torch

from kdflow import plugins


@pytest.fixture(autouse=True, scope="module")
def fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny
    loaded = cache(plugins.load)

    def load(block: Iterable[str] = ()) -> plugins.Plugins:
        return loaded(tuple(block))

    load.cache_clear = loaded.cache_clear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "load", load)
        yield
    torch.set_num_threads(threads)
