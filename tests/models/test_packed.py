"""Packed batches through real architectures: as if each sample were alone, and as transformers itself computes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kdflow.contracts import KdflowError, Pair, TokenBatch, Tokens
from kdflow.data.packing import collate
from kdflow.models import packed
from kdflow.models.attention import PACKED
from kdflow.models.packed import decoder, packed_hidden_states, probe_packing
from tests.support.architectures import VOCABULARY, make_architecture

ARCHITECTURES = ["llama", "qwen3", "gemma3", "gemma2", "mistral", "gpt-oss", "gpt2", "cohere2", "phi", "smollm3"]
LENGTHS = [9, 17, 1, 13]  # longer than the sliding windows


def samples(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, length) for length in LENGTHS]


def batch(*ids: np.ndarray) -> TokenBatch:
    nothing = np.zeros(0, np.int64)
    return collate([Pair(str(at), Tokens(one, nothing, nothing)) for at, one in enumerate(ids)], False).student


def eager(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """What transformers' own attention gives, a sample at a time."""
    model.set_attn_implementation("eager")
    states: Tensor = decoder(model)(input_ids=torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
    model.set_attn_implementation(PACKED)
    return states


def gradients(model: PreTrainedModel, states: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states.dtype)
    names, parameters = zip(*decoder(model).named_parameters(), strict=True)
    found = torch.autograd.grad((states * weight).sum(), parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm().clamp_min(1e-3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_samples_are_as_if_each_were_alone(name: str) -> None:
    model, ids = make_architecture(name), samples()
    states = packed_hidden_states(model, batch(*ids))
    for expected in (
        torch.cat([packed_hidden_states(model, batch(one)) for one in ids]),
        torch.cat([eager(model, one) for one in ids]),
    ):
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=2e-5)
        found, wanted = gradients(model, states), gradients(model, expected)
        assert found.keys() == wanted.keys()
        for parameter in wanted:
            assert relative(found[parameter], wanted[parameter]) < 1e-4, parameter
        states = packed_hidden_states(model, batch(*ids))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_packed_samples_in_bf16_are_right_to_rounding(name: str) -> None:
    model, ids = make_architecture(name, dtype=torch.bfloat16), samples()
    states = packed_hidden_states(model, batch(*ids))
    alone = torch.cat([packed_hidden_states(model, batch(one)) for one in ids])
    assert states.dtype == torch.bfloat16
    # A token that goes to other experts for rounding alone is no leak, so the middle one counts.
    errors = (states - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    assert float(errors.median()) < 2e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_other_samples_and_later_tokens_change_nothing(name: str) -> None:
    model, ids, others = make_architecture(name), samples(), samples(seed=1)
    before = packed_hidden_states(model, batch(*ids)).split(LENGTHS)
    for changed in range(len(ids)):
        mixed = [others[at] if at == changed else one for at, one in enumerate(ids)]
        after = packed_hidden_states(model, batch(*mixed)).split(LENGTHS)
        for at in range(len(ids)):
            assert torch.allclose(before[at], after[at], rtol=1e-5, atol=1e-5) == (at != changed)
    longest = ids[1].copy()
    longest[-1] = (longest[-1] + 1) % VOCABULARY
    after = packed_hidden_states(model, batch(ids[0], longest, *ids[2:])).split(LENGTHS)
    torch.testing.assert_close(after[1][:-1], before[1][:-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[1][-1], before[1][-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_generation_with_a_cache_is_that_of_eager_attention(name: str) -> None:
    model = make_architecture(name)
    prompt = torch.from_numpy(samples()[0])[None]
    written = {}
    for implementation in (PACKED, "eager"):
        model.set_attn_implementation(implementation)
        written[implementation] = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, use_cache=True,
            eos_token_id=None, pad_token_id=0, no_repeat_ngram_size=1,
        )[0].tolist()  # fmt: skip
    assert len(set(written[PACKED])) >= 16
    assert written[PACKED] == written["eager"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_tokens_that_follow_a_cache_see_what_they_saw_without_it(name: str) -> None:
    model, ids = make_architecture(name), samples()[1]
    cache, states = DynamicCache(config=model.config), []
    for chunk in np.split(ids, [6, 10, 11]):  # several at once, one, and several again
        chunk = torch.from_numpy(chunk)[None]
        states.append(decoder(model)(input_ids=chunk, past_key_values=cache, use_cache=True).last_hidden_state[0])
    torch.testing.assert_close(torch.cat(states), packed_hidden_states(model, batch(ids)), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_passes_architectures_that_keep_samples_apart(name: str, dtype: torch.dtype) -> None:
    probe_packing(make_architecture(name, dtype=dtype))


@pytest.mark.parametrize("name", ["mamba", "stablelm", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_refuses_architectures_whose_samples_see_each_other(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(KdflowError, match="lets packed samples see each other"):
        probe_packing(make_architecture(name, dtype=dtype))


def test_the_probe_refuses_architectures_that_cannot_be_run_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_architecture("llama")
    monkeypatch.setattr(decoder(model), "forward", lambda **_: {}["samples"])
    with pytest.raises(KdflowError, match=r"LlamaForCausalLM.* cannot read packed samples: KeyError: 'samples'"):
        probe_packing(model)


def test_the_probe_refuses_positions_that_go_on_from_sample_to_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed.packed_hidden_states

    def shifted(model: PreTrainedModel, tokens: TokenBatch) -> Tensor:
        tokens.position_ids.copy_(torch.arange(len(tokens.position_ids)) ** 2)
        return whole(model, tokens)

    monkeypatch.setattr(packed, "packed_hidden_states", shifted)
    with pytest.raises(KdflowError, match="see each other"):
        probe_packing(make_architecture("llama"))
