"""Training in less memory: bf16 parameters with stochastic rounding, and 8-bit moments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import kdflow
from kdflow.config import TrainingConfig
from kdflow.contracts import KdflowError
from kdflow.runtime.export import export
from kdflow.runtime.low_precision import StochasticAdamW, round_stochastically
from kdflow.runtime.optimizer import make_optimizer, optimizer_step, state_of
from tests.support.models import make_model
from tests.support.runs import interrupted, make_run, saved, trajectory

RunFile = Callable[..., dict[str, Any]]
OPTIONS = {
    "fp32": {},
    "bf16": {"parameters": "bfloat16"},
    "8-bit": {"optimizer": "adamw_8bit"},
    "8-bit moments of bf16": {"optimizer": "adamw_8bit", "parameters": "bfloat16"},
}


# --- stochastic rounding ---------------------------------------------------------------------------------------------


def test_rounding_gives_a_neighbour_and_is_right_on_average() -> None:
    torch.manual_seed(0)
    exact = torch.tensor([1.0 + 1 / 1024, -1.0 - 1 / 1024, 3.14159, 1e-30, -7.5e20])
    draws = torch.stack([round_stochastically(exact) for _ in range(20_000)])
    assert draws.dtype == torch.bfloat16
    ulp = exact.abs().bfloat16().float() / 128
    assert ((draws.float() - exact).abs() < ulp).all(), "one of the two nearest"
    assert all(len(column.unique()) == 2 for column in draws.T)
    assert ((draws.double().mean(0) - exact.double()).abs() < ulp / 50).all()


def test_rounding_keeps_what_bf16_can_say() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, torch.finfo(torch.bfloat16).max, torch.inf, -torch.inf])
    for _ in range(100):
        assert torch.equal(round_stochastically(values).float(), values)
    assert round_stochastically(torch.tensor([torch.nan])).isnan().all()


def test_updates_too_small_for_bf16_are_not_lost() -> None:
    """Each is 1/2560 of a parameter, a tenth of what rounding to the nearest would keep."""
    moved = {}
    for dtype, cls in ((torch.float32, torch.optim.AdamW), (torch.bfloat16, torch.optim.AdamW),
                       (torch.bfloat16, StochasticAdamW)):  # fmt: skip
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(10_000, dtype=dtype))
        optimizer = cls([weight], lr=1 / 2560, betas=(0.9, 0.95))
        if cls is StochasticAdamW:
            optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight),
                                       "exp_avg_sq": torch.zeros_like(weight)}  # fmt: skip
        optimizer.param_groups[0]["weight_decay"] = 0.0
        for _ in range(64):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype, cls] = 1 - float(weight.detach().double().mean())
    assert moved[torch.bfloat16, torch.optim.AdamW] == 0
    assert moved[torch.bfloat16, StochasticAdamW] == pytest.approx(moved[torch.float32, torch.optim.AdamW], rel=0.02)


def test_a_second_moment_in_bf16_does_not_freeze() -> None:
    """With beta2 at 0.999 it changes by a thousandth a step, less than half of the last bit of bf16."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=0.0, betas=(0.9, 0.999))
    square = torch.ones_like(weight)
    optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": square}
    for _ in range(500):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert float(square.double().mean()) == pytest.approx(0.999**500, rel=0.02)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same run with each option, on a model whose matrices are large enough for 8-bit moments."""
    root = tmp_path_factory.mktemp("low-precision")
    model = make_model(root / "model", hidden=128, seed=1)
    found = {}
    for name, options in OPTIONS.items():
        training = {"checkpoint_every": 2, "learning_rate": 3e-3, **options}
        found[name] = make_run(tiny, student={"model": model}, training=training, output=str(root / name))
        kdflow.train(found[name])
    return found


def _checkpoint(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    return saved(Path(run["output"]) / "checkpoints" / "step-00000004")


@pytest.mark.parametrize(("name", "rel"), [("bf16", 1e-2), ("8-bit", 1e-3), ("8-bit moments of bf16", 1e-2)])
def test_losses_are_close_to_those_of_fp32_and_not_the_same(
    runs: dict[str, dict[str, Any]], name: str, rel: float
) -> None:
    exact, found = ([loss for _, loss in trajectory(runs[which]["output"], ["loss"])] for which in ("fp32", name))
    assert exact[-1] < 0.8 * exact[0]
    assert found == pytest.approx(exact, rel=rel)
    assert found != exact


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_follows_the_same_trajectory(runs: dict[str, dict[str, Any]], tmp_path: Path, name: str) -> None:
    output = interrupted(Path(runs[name]["output"]), tmp_path / "run", 2)
    torch.manual_seed(1234)  # random numbers come from the checkpoint
    kdflow.train({**runs[name], "output": str(output)}, resume="auto")
    assert trajectory(output) == trajectory(runs[name]["output"])
    ours, theirs = _checkpoint({"output": str(output)}), _checkpoint(runs[name])
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize(
    ("name", "parameters", "moments"),
    [("fp32", 4, 8), ("bf16", 2, 4), ("8-bit", 4, 2.07), ("8-bit moments of bf16", 2, 2.07)],
)
def test_bytes_of_a_parameter(runs: dict[str, dict[str, Any]], name: str, parameters: float, moments: float) -> None:
    """One scale of 4 bytes for 128 moments, and norms whose moments stay as they are."""
    tensors = _checkpoint(runs[name])
    sizes = {kind: sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith(kind))
             for kind in ("student.", "optimizer.")}  # fmt: skip
    count = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("student."))
    assert sizes["student."] == parameters * count
    assert sizes["optimizer."] == pytest.approx(moments * count, rel=0.02)


def test_bf16_parameters_are_exported_as_they_are(runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export(Path(runs["bf16"]["output"]), tmp_path / "exported")
    tensors = _checkpoint(runs["bf16"])
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters():
        assert torch.equal(tensor, tensors[f"student.model.{name}"].float())


def test_torchao_is_asked_for_before_anything_runs(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "torchao" else sys)
    with pytest.raises(KdflowError, match=r"training\.optimizer: adamw_8bit needs the package torchao") as caught:
        kdflow.train(run_file(training={"optimizer": "adamw_8bit"}))
    assert str(caught.value).endswith("pip install 'kdflow[torchao]'")
    assert not (tmp_path / "run").exists()


# --- the shards of 8-bit moments -------------------------------------------------------------------------------------


@pytest.fixture
def last_of_four_ranks() -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_a_rank_without_rows_has_the_same_names(last_of_four_ranks: Any) -> None:
    """Two rows on four ranks, such as an adapter of a small rank on many: this one has none of them."""
    layer = nn.Linear(4096, 2)
    fully_shard(layer, mesh=last_of_four_ranks)
    optimizer = make_optimizer(layer, TrainingConfig(optimizer="adamw_8bit", learning_rate=1e-3), {})
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer_step(optimizer, 1.0)
    shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in state_of(optimizer, layer.weight).items()}
    assert shapes == {
        "step": ((), torch.float32),
        "exp_avg.codes": ((2, 4096), torch.uint8), "exp_avg.scale": ((2, 16), torch.float32),
        "exp_avg_sq.codes": ((2, 4096), torch.uint8), "exp_avg_sq.scale": ((2, 16), torch.float32),
    }  # fmt: skip
    assert {key for key, tensor in state_of(optimizer, layer.weight).items() if key != "step"
            and tensor.to_local().numel()} == set()  # fmt: skip
