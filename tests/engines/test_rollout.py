"""The rollout engine in this process, against transformers' own generation and full forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdflow import plugins
from kdflow.contracts import EngineContext, KdflowError, Rollout, Sampling
from kdflow.engines.transformers.rollout import TransformersRollout, TransformersRolloutOptions
from kdflow.engines.transformers.sampling import draw, uniforms
from kdflow.models.fetch import resolve
from tests.support.architectures import VOCABULARY, make_architecture
from tests.support.models import make_tokenizer

CPU = torch.device("cpu")
REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load(model: str, dtype: torch.dtype = torch.float32, batch_tokens: int = 16384) -> TransformersRollout:
    return TransformersRollout(model, TransformersRolloutOptions(batch_tokens=batch_tokens), EngineContext(CPU, dtype))


def make_prompts(lengths: Sequence[int] = (3, 17, 1, 9, 30, 17), seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 380, length).tolist() for length in lengths]


def by_transformers(model: str, prompt: Sequence[int], new: int, vocabulary: int | None = None) -> list[int]:
    """Greedy continuation by transformers' own generate, which must be told which ids are no tokens."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([prompt])
    padding = [] if vocabulary is None else list(range(vocabulary, plain.config.vocab_size))
    made = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                          suppress_tokens=padding or None)  # fmt: skip
    return made[0, len(prompt) :].tolist()


def expected_log_probabilities(
    model: str, prompt: Sequence[int], rollout: Rollout, temperature: float = 1.0, vocabulary: int | None = None
) -> Tensor:
    """From one full forward pass over prompt and response, alone and without a cache."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*prompt, *rollout.ids]]), use_cache=False).logits[0, :, :vocabulary]
    rows = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return rows.gather(-1, torch.tensor(rollout.ids)[:, None])[:, 0]


@pytest.mark.parametrize("name", ["student", "untied"])
def test_greedy_is_what_transformers_generates(name: str, tiny: dict[str, str]) -> None:
    found = load(tiny[name]).generate(make_prompts(), Sampling(max_new_tokens=20, temperature=0))
    expected = [by_transformers(tiny[name], prompt, 20, vocabulary=384) for prompt in make_prompts()]
    assert [list(rollout.ids) for rollout in found] == expected


def test_greedy_of_a_real_model_is_what_transformers_generates() -> None:
    path = resolve(REAL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    questions = ["What is the capital of France?", "Name three colours of the rainbow, please.", "Say hello."]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                      return_dict=False)
        for question in questions
    ]  # fmt: skip
    found = load(REAL).generate(prompts, Sampling(max_new_tokens=24, temperature=0))
    assert [list(rollout.ids) for rollout in found] == [by_transformers(str(path), prompt, 24) for prompt in prompts]
    text = tokenizer.decode(found[0].ids, skip_special_tokens=True)
    assert (text, found[0].finish) == ("The capital of France is Paris.", "stop")
    for prompt, rollout in zip(prompts, found, strict=True):
        expected = expected_log_probabilities(str(path), prompt, rollout)
        torch.testing.assert_close(torch.tensor(rollout.log_probabilities), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.7])
def test_log_probabilities_are_those_of_a_full_pass_at_the_sampling_temperature(
    temperature: float, tiny: dict[str, str]
) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, top_p=0.7)
    for prompt, rollout in zip(make_prompts(), load(tiny["student"]).generate(make_prompts(), sampling), strict=True):
        expected = expected_log_probabilities(tiny["student"], prompt, rollout, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(rollout.log_probabilities), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "cohere2", "granite", "gpt-oss", "gpt2", "mistral", "smollm3"])
def test_other_architectures_in_padded_batches_with_windows_and_caches(name: str, tmp_path: Path) -> None:
    make_architecture(name).save_pretrained(tmp_path)
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path)  # larger than the model's vocabulary: nothing is padding
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17]]
    for prompt, rollout in zip(prompts, load(str(tmp_path)).generate(prompts, Sampling(12)), strict=True):
        assert max(rollout.ids) < VOCABULARY
        expected = expected_log_probabilities(str(tmp_path), prompt, rollout)
        torch.testing.assert_close(torch.tensor(rollout.log_probabilities), expected, rtol=1e-3, atol=1e-3)


def test_a_response_ends_with_the_models_positions(tmp_path: Path) -> None:
    make_architecture("gpt2", n_positions=32).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = load(str(tmp_path)).generate([[5] * length for length in (3, 30, 32)], Sampling(12, temperature=0.0))
    assert [(len(one.ids), one.finish) for one in found] == [(12, "length"), (2, "length"), (1, "length")]


def test_responses_do_not_depend_on_the_batch(tiny: dict[str, str]) -> None:
    prompts, sampling = make_prompts(), Sampling(max_new_tokens=24, n=3, seed=5)
    together = load(tiny["student"]).generate(prompts, sampling)
    small = load(tiny["student"], batch_tokens=1)
    alone = [rollout for prompt in prompts for rollout in small.generate([prompt], sampling)]
    turned = load(tiny["student"], batch_tokens=150).generate(prompts[::-1], sampling)
    turned = [rollout for at in range(len(prompts))[::-1] for rollout in turned[3 * at : 3 * at + 3]]
    assert [rollout.ids for rollout in together] == [rollout.ids for rollout in alone]
    assert [rollout.ids for rollout in together] == [rollout.ids for rollout in turned]
    assert len({len(rollout.ids) for rollout in together}) > 1, "some must end while others go on"


def test_batches_keep_to_the_budget_and_hold_prompts_of_like_lengths(tiny: dict[str, str]) -> None:
    engine, prompts = load(tiny["student"], batch_tokens=60), make_prompts((3, 17, 1, 9, 30, 17))
    sampling = Sampling(max_new_tokens=10)
    batches = list(engine._batches(prompts, [(number, 0) for number in range(6)], sampling))
    assert [[number for number, _ in batch] for batch in batches] == [[4], [1, 5], [3, 0, 2]]
    sizes = [len(batch) * (max(len(prompts[number]) for number, _ in batch) + 10) for batch in batches]
    assert max(sizes) <= 60


def test_samples_of_a_prompt_differ_and_more_of_them_begin_with_the_same(tiny: dict[str, str]) -> None:
    engine, prompts = load(tiny["student"]), make_prompts((4, 8))
    two, four = (engine.generate(prompts, Sampling(max_new_tokens=16, n=n)) for n in (2, 4))
    assert len(two) == 4
    assert len({rollout.ids for rollout in four}) == 8
    assert [rollout.ids for rollout in two] == [four[at].ids for at in (0, 1, 4, 5)]


def test_another_seed_draws_other_tokens_and_a_longer_limit_goes_on_with_the_same(tiny: dict[str, str]) -> None:
    engine, prompts = load(tiny["student"]), make_prompts((4, 8))
    first = engine.generate(prompts, Sampling(max_new_tokens=16))
    assert first == engine.generate(prompts, Sampling(max_new_tokens=16))
    other = engine.generate(prompts, Sampling(max_new_tokens=16, seed=1))
    assert all(one.ids != another.ids for one, another in zip(first, other, strict=True))
    longer = engine.generate(prompts, Sampling(max_new_tokens=40))
    assert all(one.ids[:16] == another.ids[: len(one.ids)] for one, another in zip(first, longer, strict=True))


def test_a_cold_sample_is_greedy_and_so_is_a_small_top_p(tiny: dict[str, str]) -> None:
    engine, prompts = load(tiny["student"]), make_prompts()
    greedy = [rollout.ids for rollout in engine.generate(prompts, Sampling(16, temperature=0))]
    for sampling in (Sampling(16, temperature=1e-4), Sampling(16, top_p=1e-6)):
        assert [rollout.ids for rollout in engine.generate(prompts, sampling)] == greedy
    assert [rollout.ids for rollout in engine.generate(prompts, Sampling(16))] != greedy


def test_an_end_of_sequence_ends_a_response_and_is_its_last_id(tiny: dict[str, str]) -> None:
    engine = load(tiny["student"])
    free = engine.generate(make_prompts(), Sampling(max_new_tokens=30, n=4))
    ended = [rollout for rollout in free if rollout.finish == "stop"]
    end = make_tokenizer().eos_token_id
    assert ended
    assert all(rollout.ids[-1] == end and end not in rollout.ids[:-1] for rollout in ended)
    assert all(len(rollout.ids) == 30 for rollout in free if rollout.finish == "length")
    # An id of the caller's ends a response where it first stands.
    stop = free[0].ids[3]
    cut = engine.generate(make_prompts(), Sampling(max_new_tokens=30, n=4, stop_ids=(stop,)))[0]
    assert cut.ids == free[0].ids[: free[0].ids.index(stop) + 1]
    assert cut.finish == "stop"


def test_the_end_may_be_told_by_the_generation_config_alone(tiny: dict[str, str], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny["student"])
    first = load(tiny["student"]).generate(make_prompts((5,)), Sampling(10, temperature=0))[0]
    model.generation_config.eos_token_id = [2, first.ids[4]]
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = load(str(tmp_path)).generate(make_prompts((5,)), Sampling(10, temperature=0))[0]
    assert found.ids == first.ids[: first.ids.index(first.ids[4]) + 1]
    assert found.finish == "stop"


def test_ids_that_are_no_tokens_are_never_drawn(tiny: dict[str, str]) -> None:
    rollouts = load(tiny["untied"]).generate(make_prompts(), Sampling(max_new_tokens=30, temperature=3.0, n=4))
    assert max(max(rollout.ids) for rollout in rollouts) < 384
    prompt = make_prompts()[0]
    expected = expected_log_probabilities(tiny["untied"], prompt, rollouts[0], 3.0, vocabulary=384)
    torch.testing.assert_close(torch.tensor(rollouts[0].log_probabilities), expected, rtol=1e-4, atol=1e-4)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.5, -1.0, -math.inf, 2.0, 1.0])
    uniform = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for sampling, expected in (
        (Sampling(), logits.softmax(-1)),
        (Sampling(temperature=0.5), (2 * logits).softmax(-1)),
        # The probabilities are 0.610, 0.224, 0.136 and 0.030: two tokens reach 0.8, a third is needed for 0.85.
        (Sampling(top_p=0.8), logits.masked_fill(torch.arange(5) < 3, -math.inf).softmax(-1)),
        (Sampling(top_p=0.85), logits.masked_fill(torch.arange(5) == 1, -math.inf).softmax(-1)),
    ):  # fmt: skip
        ids, log_probabilities = draw(logits.expand(20000, -1), uniform, sampling)
        share = torch.bincount(ids, minlength=5) / 20000
        torch.testing.assert_close(share, expected, rtol=0, atol=2e-4)
        whole = (logits / sampling.temperature).log_softmax(-1)
        torch.testing.assert_close(log_probabilities, whole[ids])


def test_draws_are_uniform_and_differ_between_prompts_samples_and_seeds() -> None:
    sampling = Sampling(max_new_tokens=4000)
    one = uniforms([1, 2, 3], 0, sampling)
    assert abs(float(one.mean()) - 0.5) < 0.02
    assert torch.equal(one, uniforms((1, 2, 3), 0, sampling))
    assert torch.equal(one[:7], uniforms([1, 2, 3], 0, Sampling(max_new_tokens=7)))
    for other in (uniforms([1, 2, 4], 0, sampling), uniforms([1, 2, 3], 1, sampling),
                  uniforms([1, 2, 3], 0, Sampling(max_new_tokens=4000, seed=1))):  # fmt: skip
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.06


def test_new_weights_change_what_is_written(tiny: dict[str, str]) -> None:
    engine = load(tiny["untied"])
    before = engine.generate(make_prompts(), Sampling(12, temperature=0))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.5 * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in load_file(Path(tiny["untied"]) / "model.safetensors").items()
    }
    assert "lm_head.weight" in weights
    engine.update_weights(iter(weights.items()))
    changed = AutoModelForCausalLM.from_pretrained(tiny["untied"])
    changed.load_state_dict(weights)
    found = engine.generate(make_prompts(), Sampling(12, temperature=0))
    assert [rollout.ids for rollout in found] != [rollout.ids for rollout in before]
    for prompt, rollout in zip(make_prompts(), found, strict=True):
        with torch.no_grad():
            logits = changed(input_ids=torch.tensor([[*prompt, *rollout.ids]])).logits[0, len(prompt) - 1 : -1, :384]
        assert rollout.ids == tuple(logits.argmax(-1).tolist())


def test_weights_of_another_model_are_refused(tiny: dict[str, str]) -> None:
    with pytest.raises(KdflowError, match=r"LlamaForCausalLM has no weight 'other\.weight'"):
        load(tiny["student"]).update_weights(iter([("other.weight", torch.zeros(1))]))


def test_it_sleeps_wakes_and_closes(tiny: dict[str, str]) -> None:
    engine = load(tiny["student"], torch.bfloat16)
    before = engine.generate(make_prompts(), Sampling(8))
    engine.sleep()
    engine.wake()
    assert engine.generate(make_prompts(), Sampling(8)) == before
    engine.close()


def test_no_prompts_give_no_responses(tiny: dict[str, str]) -> None:
    assert load(tiny["student"]).generate([], Sampling()) == []


@pytest.mark.parametrize(("values", "message"), [
    ({"max_new_tokens": 0}, "sampling: max_new_tokens must be at least 1, not 0"),
    ({"temperature": -0.5}, "sampling: temperature must be a number from 0, not -0.5"),
    ({"temperature": math.nan}, "sampling: temperature must be a number from 0, not nan"),
    ({"top_p": 0.0}, "sampling: top_p must be above 0 and at most 1, not 0.0"),
    ({"top_p": 1.5}, "sampling: top_p must be above 0 and at most 1, not 1.5"),
    ({"n": 0}, "sampling: n must be at least 1, not 0"),
    ({"seed": -1}, "sampling: seed must be at least 0, not -1"),
])  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(KdflowError, match=message):
        Sampling(**values)  # type: ignore[arg-type]


def test_it_is_registered() -> None:
    assert plugins.load().find("transformers", "rollout engine").cls is TransformersRollout


def test_prompt_and_response_are_no_longer_than_they_may_be(tiny: dict[str, str]) -> None:
    engine, prompts = load(tiny["student"]), make_prompts()
    most = max(map(len, prompts)) + 3
    free = engine.generate(prompts, Sampling(max_new_tokens=30, seed=2))
    bound = engine.generate(prompts, Sampling(max_new_tokens=30, seed=2, max_length=most))
    for prompt, one, other in zip(prompts, free, bound, strict=True):
        room = most - len(prompt)
        assert other.ids == one.ids[:room]
        assert other.finish == ("stop" if len(one.ids) <= room and one.finish == "stop" else "length")
    assert len({len(one.ids) for one in bound}) > 1
