"""How the student's blocks are sharded, compiled and computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdflow
from kdflow import plugins
from kdflow.config import StudentConfig, TrainingConfig
from kdflow.contracts import Batch, TokenBatch
from kdflow.runtime.processes import Processes
from kdflow.runtime.student import Student
from tests.support.models import make_model, make_tokenizer

Make = Callable[..., Student]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A student of five blocks, with ``training`` as given."""
    model = make_model(tmp_path / "student", hidden=32, layers=5, seed=0, tokenizer=make_tokenizer())
    algorithm = plugins.load([]).algorithm("sft")
    tokenizer = kdflow.tokenizers.load(model)
    with Processes() as processes:

        def made(**training: Any) -> Student:
            return Student(
                StudentConfig(model=model), TrainingConfig(**training), algorithm(algorithm.Options()), tokenizer, None,
                None, processes,
            )  # fmt: skip

        yield made


@pytest.mark.parametrize(("checkpointing", "units"), [(False, 3), (True, 6), (2, 6)])
def test_four_blocks_are_a_unit_where_nothing_is_gathered_and_all_is_kept(
    make: Make, checkpointing: bool | int, units: int
) -> None:
    student = make(activation_checkpointing=checkpointing)
    assert len({id(unit._get_fsdp_state()) for unit in student._units}) == units  # with the root's


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_that_are_computed_again_keep_less(make: Make, compiled: bool) -> None:
    count = torch.arange(512)
    tokens = TokenBatch(count % 300, count, torch.tensor([0, 512]).int(), count[:-1], count[:-1] * 0, 512, "")

    def kept(again: bool) -> int:
        student, sizes = make(compile=compiled, activation_checkpointing=again), dict[int, int]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            student.root(Batch(tokens, None), lambda side: (side.rows.sum(),))
        return sum(sizes.values())

    assert kept(again=True) < kept(again=False) / 2


def test_compiled_blocks_make_one_product_of_queries_keys_and_values(
    make: Make, graphs: list[torch.fx.GraphModule]
) -> None:
    count = torch.arange(8)
    tokens = TokenBatch(count, count, torch.tensor([0, 8]).int(), count[:-1], count[:-1] * 0, 8, "")
    make(compile=True).root(Batch(tokens, None), lambda side: (side.rows.sum(),))
    assert sum(len(graph.graph.find_nodes(op="call_function", target=torch.split)) for graph in graphs) == 1
