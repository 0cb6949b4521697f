"""Linear maps of one input as one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from kdflow.models.joined import joining

CONFIG: dict[str, Any] = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa",
}  # fmt: skip


class Linears(nn.Module):
    """Of one input, of so many features each."""

    def __init__(self, *features: int, frozen: int = 0) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, count, bias=False) for count in features)
        for part in self.parts[:frozen]:
            part.requires_grad_(False)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(inputs) for part in self.parts)


def _products(graphs: list[fx.GraphModule]) -> list[int]:
    """How many linear maps each has, with those that are computed again."""
    return [
        sum(
            len(part.graph.find_nodes(op="call_function", target=linear))
            for part in graph.modules()
            if isinstance(part, fx.GraphModule)
        )
        for graph in graphs
    ]


def _gradients(run: Callable[..., Any], module: nn.Module, *inputs: Any) -> list[Tensor]:
    """What it returns, and the gradients of its inputs and parameters."""
    module.zero_grad()
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) if torch.is_tensor(x) else x for x in inputs)
    returned = [x for x in torch.utils._pytree.tree_leaves(run(*inputs)) if x is not None and x.requires_grad]
    torch.manual_seed(1)
    sum((x * torch.randn_like(x)).sum() for x in returned).backward()
    learnt = [p.grad for p in module.parameters() if p.grad is not None]
    return [*returned, *(x.grad for x in inputs if torch.is_tensor(x) and x.grad is not None), *learnt]


def _same(module: nn.Module, run: Callable[..., Any], *inputs: Any) -> None:
    expected, found = _gradients(module.forward, module, *inputs), _gradients(run, module, *inputs)
    assert len(found) == len(expected)
    torch.testing.assert_close(found, expected)


def _attend(attention: Any) -> None:
    """Compare a compiled attention layer with the same one as it is."""
    config = (Qwen2Config if attention is Qwen2Attention else LlamaConfig)(**CONFIG)
    torch.manual_seed(0)
    module = attention(config, layer_idx=0)
    angles = torch.randn(1, 7, 8)
    run = torch.compile(module.forward, backend=joining("inductor"))
    _same(module, run, torch.randn(1, 7, 32), (angles.cos(), angles.sin()), None)


@pytest.mark.parametrize("attention", [LlamaAttention, Qwen2Attention])  # without biases, and with
def test_queries_keys_and_values_are_one_product(graphs: list[fx.GraphModule], attention: Any) -> None:
    _attend(attention)
    assert _products(graphs) == [2]  # and what is made of their answer


@pytest.mark.parametrize("attention", [LlamaAttention, Qwen2Attention])
def test_machine_code_of_them(attention: Any) -> None:
    _attend(attention)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (Linears(8, 16, 8, 24), 1),
        (Linears(8, 16), 2),  # a pair
        (Linears(8, 16, 8, 1), 2),  # products with rows of one more number would be slow
        (Linears(8, 16, 8, 8, 8, 16, frozen=3), 2),  # a frozen weight has no gradient to compute
    ],
)
def test_what_is_joined(graphs: list[fx.GraphModule], module: Linears, count: int) -> None:
    _same(module, torch.compile(module.forward, backend=joining("inductor")), torch.randn(5, 16))
    assert _products(graphs) == [count]


def test_what_is_computed_again_is_joined(graphs: list[fx.GraphModule]) -> None:
    module = Linears(8, 16, 8)

    def run(inputs: Tensor) -> Any:
        return checkpoint(module.forward, inputs, use_reentrant=False)

    _same(module, torch.compile(run, backend=joining("inductor")), torch.randn(5, 16))
    assert _products(graphs) == [1]


def test_what_is_computed_on_the_way_is_not_joined(graphs: list[fx.GraphModule]) -> None:
    """A weight that is made of another's result is not there yet when the first product is."""
    module = Linears(16, 16, 16)

    def run(inputs: Tensor) -> Tensor:
        found = inputs
        for weight in module.parameters():
            found = linear(inputs, weight + found.mean(), None)
        return found

    expected = run(inputs := torch.randn(5, 16))
    torch.testing.assert_close(torch.compile(run, backend=joining("inductor"))(inputs), expected)
    assert _products(graphs) == [3]
