"""How the student's blocks are handled by FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest

import kdflow
from kdflow import plugins
from kdflow.config import StudentConfig, TrainingConfig
from kdflow.runtime.processes import Processes
from kdflow.runtime.student import Student
from tests.support.models import make_model, make_tokenizer


@pytest.mark.parametrize(("checkpointing", "units"), [(False, 3), (True, 6), (2, 6)])
def test_four_blocks_are_a_unit_where_nothing_is_gathered_and_all_is_kept(
    tmp_path: Path, checkpointing: bool | int, units: int
) -> None:
    model = make_model(tmp_path / "student", hidden=32, layers=5, seed=0, tokenizer=make_tokenizer())
    algorithm = plugins.load([]).algorithm("sft")
    training = TrainingConfig(activation_checkpointing=checkpointing)
    with Processes() as processes:
        student = Student(
            StudentConfig(model=model), training, algorithm(algorithm.Options()), kdflow.tokenizers.load(model), None,
            None, processes,
        )  # fmt: skip
        assert len({id(unit._get_fsdp_state()) for unit in student._units}) == units  # with the root's
