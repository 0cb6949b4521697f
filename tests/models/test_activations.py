"""Which blocks are computed again in the backward pass."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdflow.contracts import KdflowError
from kdflow.models.activations import checkpoint_activations
from kdflow.models.loading import blocks


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=5,
                         num_attention_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).train()


@pytest.mark.parametrize(
    ("every", "recomputed"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (5, [0])]
)
def test_every_kth_block_is_computed_twice(every: int, recomputed: list[int]) -> None:
    model, plain, computed = _model(), _model(), Counter[int]()
    checkpoint_activations(model, every)
    for index, block in enumerate(blocks(model)):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: computed.update([index]))
    ids = torch.arange(12)[None]
    losses = [each(input_ids=ids, labels=ids, use_cache=False).loss for each in (model, plain)]
    for loss in losses:
        loss.backward()
    assert computed == {index: 1 + (index in recomputed) for index in range(5)}
    assert torch.equal(*losses)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_step_over_more_blocks_than_there_are_is_refused() -> None:
    with pytest.raises(KdflowError, match=r"training.activation_checkpointing is 6, but the student has 5 blocks"):
        checkpoint_activations(_model(), 6)
