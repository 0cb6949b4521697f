"""Models as they are loaded, cut in depth, and refused with a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdflow.contracts import KdflowError
from kdflow.models.loading import (
    as_saved,
    blocks,
    config_digest,
    cut_depth,
    load_model,
    load_tokenizer,
    meta_model,
    same_tokenizer,
    weights_digest,
)
from kdflow.models.packed import decoder
from tests.support.architectures import make_architecture, make_config
from tests.support.models import as_pickles

CPU = torch.device("cpu")
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directories of tiny models, each written once."""
    root = tmp_path_factory.mktemp("architectures")

    def directory(name: str) -> str:
        if not (root / name).exists():
            make_architecture(name).save_pretrained(root / name)
        return str(root / name)

    return directory


@pytest.fixture
def broken(tiny: dict[str, str], tmp_path: Path) -> Path:
    """A copy of the tiny student, to be broken."""
    return Path(shutil.copytree(tiny["student"], tmp_path / "broken"))


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def states(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = decoder(model)(input_ids=IDS, use_cache=False).last_hidden_state
    return found


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_loaded_in_the_dtype_asked_for_and_is_that_of_transformers(
    tiny: dict[str, str], dtype: torch.dtype
) -> None:
    model = load_model(tiny["student"], dtype, CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    plain = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=dtype, attn_implementation="eager")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(states(model), states(plain), rtol=tolerance, atol=tolerance)


def test_weights_are_told_apart_by_what_is_read_of_them(broken: Path) -> None:
    weights = weights_digest(str(broken))
    torch.save({}, broken / "pytorch_model.bin")
    assert weights_digest(str(broken)) == weights, "transformers reads safetensors first"
    (broken / "pytorch_model.bin").unlink()
    as_pickles(broken)
    loaded = load_model(str(broken), torch.float32, CPU)
    torch.save({}, broken / "training_args.bin")
    other = Path(shutil.copytree(broken, broken.with_name("other")))
    before = weights_digest(str(broken))
    assert before == weights_digest(str(other)) != weights
    shard = other / "pytorch_model-00002-of-00002.bin"
    torch.save({name: tensor * 2 for name, tensor in torch.load(shard).items()}, shard)
    assert not torch.equal(states(load_model(str(other), torch.float32, CPU)), states(loaded))
    assert weights_digest(str(other)) != before
    for file in broken.glob("pytorch_model*.bin"):
        file.unlink()
    assert weights_digest(str(broken)) is None


def test_configs_are_told_apart_by_what_is_computed(broken: Path) -> None:
    before = config_digest(str(broken))
    change(broken / "config.json", transformers_version="0", dtype="bfloat16", use_cache=False, _name_or_path="a")
    assert config_digest(str(broken)) == before
    change(broken / "config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert config_digest(str(broken)) != before
    (broken / "config.json").write_text("{")
    with pytest.raises(KdflowError, match=f"model {broken}: {broken}/config.json is no JSON: "):
        config_digest(str(broken))


# --- cutting in depth -------------------------------------------------------------------------------------------------

CUTS: list[tuple[str | list[int], list[int]]] = [
    (":", [0, 1, 2, 3]),
    ("::2", [0, 2]),
    ("1:", [1, 2, 3]),
    (":-1", [0, 1, 2]),
    ("-2:", [2, 3]),
    ("1:99:2", [1, 3]),
    ([0, 3], [0, 3]),
    ([2], [2]),
    ([3, 1], [3, 1]),
]


@pytest.mark.parametrize(("keep", "kept"), CUTS, ids=str)
def test_the_layers_asked_for_are_kept_in_their_order(
    keep: str | list[int], kept: list[int], saved: Callable[[str], str]
) -> None:
    whole = load_model(saved("gemma3"), torch.float32, CPU)
    cut = load_model(saved("gemma3"), torch.float32, CPU, keep)
    assert cut.config.num_hidden_layers == len(blocks(cut)) == len(kept)
    for block, layer in zip(blocks(cut), kept, strict=True):
        expected = blocks(whole)[layer].state_dict()
        assert block.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in block.state_dict().items())
    kinds = make_config("gemma3").layer_types
    assert cut.config.layer_types == [kinds[layer] for layer in kept]


@pytest.mark.parametrize("keep", [[4], [0, 1, 7], [-1], [], "4:", "2:1"], ids=str)
def test_layers_that_do_not_exist_or_none_are_refused(keep: str | Sequence[int], saved: Callable[[str], str]) -> None:
    with pytest.raises(KdflowError, match=r"student.keep_layers keeps \[.*\] of the layers 0 to 3; choose among these"):
        load_model(saved("gemma3"), torch.float32, CPU, keep)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gemma2", "gpt-oss", "gpt2", "smollm3"])
def test_a_cut_model_generates_and_is_the_same_when_read_back(
    name: str, saved: Callable[[str], str], tmp_path: Path
) -> None:
    cut = load_model(saved(name), torch.float32, CPU, "1:")
    cut.save_pretrained(tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", attn_implementation="eager")
    torch.testing.assert_close(states(cut), states(again), rtol=1e-4, atol=1e-4)
    written = [
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
                       no_repeat_ngram_size=1)[0].tolist()
        for model in (cut, again)
    ]  # fmt: skip
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("name", "options", "keep"),
    [
        ("qwen3-moe", {"mlp_only_layers": [0]}, "1::2"),
        ("qwen3-moe", {"mlp_only_layers": [0, 3]}, [3, 1]),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "::2"),
        ("glm4-moe", {}, "1:"),
        ("glm4-moe", {}, "2:"),
    ],
    ids=str,
)
def test_a_cut_mixture_keeps_each_layer_what_it_is(
    name: str, options: dict[str, Any], keep: Any, tmp_path: Path
) -> None:
    make_architecture(name, num_hidden_layers=4, **options).save_pretrained(tmp_path)
    cut = load_model(str(tmp_path), torch.float32, CPU, keep)
    cut.save_pretrained(tmp_path / "cut")
    torch.testing.assert_close(states(cut), states(load_model(str(tmp_path / "cut"), torch.float32, CPU)))


def test_a_cut_that_no_config_describes_is_refused(tmp_path: Path) -> None:
    make_architecture("glm4-moe", num_hidden_layers=4).save_pretrained(tmp_path)
    told = r"student.keep_layers keeps \[3, 0\], which no config of a Glm4MoeForCausalLM describes: .*mlp"
    with pytest.raises(KdflowError, match=told):
        meta_model(str(tmp_path), torch.float32, [3, 0])


def test_layers_without_positions_stay_without(saved: Callable[[str], str]) -> None:
    cut = load_model(saved("smollm3"), torch.float32, CPU, [2, 3])
    assert cut.config.no_rope_layers == [1, 0]


def test_layers_are_numbered_anew_for_the_cache() -> None:
    model = make_architecture("gemma3")
    cut_depth(model, [1, 3])
    numbers = [{m.layer_idx for m in block.modules() if hasattr(m, "layer_idx")} for block in blocks(model)]
    assert numbers == [{0}, {1}]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    for load in (lambda path: load_model(path, torch.float32, CPU), load_tokenizer):
        with pytest.raises(KdflowError, match=r"model not found: .*nowhere"):
            load(str(tmp_path / "nowhere"))


def test_a_vision_language_model_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.Gemma3Config(text_config={**small, "vocab_size": 50}, vision_config=small).save_pretrained(tmp_path)
    with pytest.raises(KdflowError, match="is a gemma3 with a vision or audio part; kdflow distils text models only"):
        load_model(str(tmp_path), torch.float32, CPU)


def test_an_encoder_decoder_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(KdflowError, match="cannot be loaded as a causal language model: Unrecognized") as refusal:
        load_model(str(tmp_path), torch.float32, CPU)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_weights_that_would_be_left_random_are_refused(tmp_path: Path) -> None:
    config = make_config("llama", num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(KdflowError, match=r"lack 1 weights of a LlamaForCausalLM, such as lm_head.weight"):
        load_model(str(tmp_path), torch.float32, CPU)


@pytest.mark.parametrize("name", ["stablelm", "mamba"])
def test_an_architecture_that_cannot_keep_samples_apart_is_refused(name: str, saved: Callable[[str], str]) -> None:
    with pytest.raises(KdflowError, match="lets packed samples see each other"):
        load_model(saved(name), torch.float32, CPU)


def test_an_architecture_that_cannot_take_our_attention_is_refused(tmp_path: Path) -> None:
    transformers.GPTJForCausalLM(make_config("gptj")).save_pretrained(tmp_path)
    with pytest.raises(KdflowError, match="cannot be loaded as a causal language model: KeyError: 'kdflow_packed'"):
        load_model(str(tmp_path), torch.float32, CPU)


def test_damaged_weights_are_refused(broken: Path) -> None:
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    for damage, reason in ((content[: len(content) // 2], "incomplete"), (b"no weights", "header")):
        weights.write_bytes(damage)
        with pytest.raises(
            KdflowError, match=f"cannot be loaded as a causal language model: SafetensorError: .*{reason}"
        ):
            load_model(str(broken), torch.float32, CPU)
    weights.unlink()
    with pytest.raises(KdflowError, match=r"cannot be loaded as a causal language model: .*no file named"):
        load_model(str(broken), torch.float32, CPU)


def test_weights_of_another_shape_are_refused(broken: Path) -> None:
    change(broken / "config.json", vocab_size=500)
    with pytest.raises(KdflowError, match=r"cannot be loaded as a causal language model: .*mismatched_sizes"):
        load_model(str(broken), torch.float32, CPU)


@pytest.mark.parametrize("content", ["{", '{"model_type": "frobnicator"}', "{}"])
def test_a_config_that_cannot_be_read_is_refused(broken: Path, content: str) -> None:
    (broken / "config.json").write_text(content)
    with pytest.raises(KdflowError, match=f"model {broken}: "):
        load_model(str(broken), torch.float32, CPU)


def test_a_missing_tokenizer_is_refused(saved: Callable[[str], str]) -> None:
    with pytest.raises(KdflowError, match=r"model .*llama has no tokenizer: .* holds none of tokenizer\*, vocab\*"):
        load_tokenizer(saved("llama"))


def test_a_tokenizer_that_transformers_makes_up_is_refused(saved: Callable[[str], str]) -> None:
    with pytest.raises(KdflowError, match=r"gemma3 has no tokenizer: .* holds no vocabulary"):
        load_tokenizer(saved("gemma3"))


def test_a_damaged_tokenizer_is_refused(broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(KdflowError, match=rf"can be loaded: {broken}/tokenizer\.json is no JSON: .*line 1 column 2"):
        load_tokenizer(str(broken))


def test_a_tokenizer_is_loaded_whole(tiny: dict[str, str]) -> None:
    tokenizer = load_tokenizer(tiny["student"])
    assert tokenizer.decode(tokenizer.encode("Häuser am Meer, 海")) == "Häuser am Meer, 海"
    assert tokenizer.chat_template


def test_models_of_one_family_have_the_same_tokenizer(tiny: dict[str, str]) -> None:
    assert same_tokenizer(tiny["student"], tiny["teacher"])
    assert not same_tokenizer(tiny["student"], tiny["foreign"])


@pytest.mark.parametrize(
    "differ",
    [
        lambda model: change(model / "tokenizer.json", padding={"strategy": "BatchLongest"}),
        lambda model: change(model / "tokenizer_config.json", add_bos_token=True),
        lambda model: change(model / "config.json", model_type="qwen2"),
        lambda model: (model / "chat_template.jinja").write_text("{{ messages }}"),
        lambda model: (model / "added_tokens.json").write_text('{"<new>": 900}'),
        lambda model: (model / "config.json").write_text("{"),
    ],
)
def test_a_tokenizer_with_another_file_is_another(
    differ: Callable[[Path], object], broken: Path, tiny: dict[str, str]
) -> None:
    change(broken / "config.json", hidden_size=7)
    (broken / "model.safetensors.index.json").write_text("{}")
    assert same_tokenizer(str(broken), tiny["student"])  # which has other weights, but they are none of it
    differ(broken)
    assert not same_tokenizer(str(broken), tiny["student"])


@pytest.mark.parametrize("name", ["qwen3-moe", "gemma3", "gpt2", "gpt-oss"])
def test_weights_as_saved_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    model = make_architecture(name)
    model.save_pretrained(tmp_path)
    found = dict(as_saved(meta_model(str(tmp_path), torch.float32), model.named_parameters()))
    files = load_file(tmp_path / "model.safetensors")
    assert found.keys() == files.keys()
    assert all(torch.equal(found[key], files[key]) for key in files)
    with pytest.raises(KdflowError, match="has no weight 'other'; these weights are another model's"):
        list(as_saved(model, [("other", torch.zeros(2))]))
