"""Linear maps of one input, such as those to queries, keys and values, as one product of a compiled block.

Three products forward and six backward become one and two: larger for the device, and fewer for the host to launch.
Weights keep their names and shapes, since they are put together while the block runs.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import lookup_backend
from torch.nn.functional import linear

Compile = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]

# Pairs are left as they are: a gate and what passes it are wide products already, and the backward pass keeps weights
# that are put together, which for these would be most of a block's.
_FEWEST = 3
# Features, 16 bytes in bf16: a product is slow whose rows begin elsewhere.
_ALIGNED = 8


@cache  # one function for all blocks: the compiler uses its work again only where a block asks for the same
def joining(backend: str) -> Compile:
    """A backend of torch.compile that joins linear maps before ``backend`` compiles them."""
    compile_graph = lookup_backend(backend)

    def join_and_compile(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for part in module.modules():  # what is computed again has a graph of its own
            if isinstance(part, fx.GraphModule):
                _join(part)
        return compile_graph(module, inputs)

    return join_and_compile


def _join(module: fx.GraphModule) -> None:
    """Replace linear maps of the same input by one, and parts of what it returns.

    Its input must not be changed in place between them, which no decoder of transformers does.
    """
    graph = module.graph
    placeholders = [node for node in graph.find_nodes(op="placeholder") if "example_value" in node.meta]
    given = {node: node.meta["example_value"] for node in placeholders}
    alike: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=linear):
        if len(node.args) != 3 or node.kwargs:  # not what nn.Linear calls
            continue
        source, weight, bias = node.args
        # Parameters alone: they are there before the first map. All of them learn, or none.
        if weight in given and (bias is None or bias in given) and len(given[weight]) % _ALIGNED == 0:
            alike[source, bias is None, given[weight].requires_grad].append(node)
    for (source, no_bias, _), nodes in alike.items():
        if len(nodes) < _FEWEST:
            continue
        weights, biases = [node.args[1] for node in nodes], [node.args[2] for node in nodes if not no_bias]
        with graph.inserting_before(nodes[0]):
            weight = graph.call_function(torch.cat, (weights,))
            bias = None if no_bias else graph.call_function(torch.cat, (biases,))
            product = graph.call_function(linear, (source, weight, bias))
            parts = graph.call_function(torch.split, (product, [len(given[one]) for one in weights], -1))
            for index, node in enumerate(nodes):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, index)))
        for node in nodes:
            graph.erase_node(node)
    module.recompile()
