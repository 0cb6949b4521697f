"""Nine real tokenizers against the libraries that they were made with, over 200 mixed texts."""

from __future__ import annotations

import base64
import json
import pickle
import random
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from sentencepiece import SentencePieceProcessor

import kdflow
from kdflow.contracts import KdflowError
from kdflow.tokenizers import Tokenizer, compare_vocabularies, roundtrip
from tests.support.texts import drawn, mixed
from tests.support.tokenizers import PACKAGES, as_tokenizer_json, directory
from tests.tokenizers.test_tokenizer import assert_spelling

pytestmark = pytest.mark.network

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
Encode = Callable[[str], list[int]]


@cache
def load(name: str) -> Tokenizer:
    return kdflow.tokenizers.load(directory(name))


# --- the originals ---------------------------------------------------------------------------------------------------


def of_ranks(ranks: dict[bytes, int], pattern: str) -> Encode:
    encoding = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary


def rank_file(name: str, file: str) -> dict[bytes, int]:
    pairs = (line.split() for line in (directory(name) / file).read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def of_tokenizer_json(name: str) -> Encode:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory(name) / "tokenizer.json"))
    if name == "gemma3":  # by its tokenizer_config.json alone, a special token
        tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", normalized=False)])
    tokenizer.encode_special_tokens = True
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def of_pieces(name: str) -> Encode:
    model = SentencePieceProcessor(model_file=str(directory(name) / "tokenizer.model"))
    return lambda text: list(model.encode(text))


def of_qwen() -> Encode:
    # The pattern, and the added tokens that are text, are those of another maker's file of a later tokenizer, which has
    # more of these.
    later = json.loads((directory("qwen3") / "tokenizer.json").read_bytes())
    pattern = later["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    added = {one["content"]: one["id"] for one in later["added_tokens"] if not one["special"] and one["id"] < 151_665}
    encoding = tiktoken.Encoding(
        "reference", pat_str=pattern, mergeable_ranks=rank_file("qwen2.5", "qwen.tiktoken"), special_tokens=added
    )
    return lambda text: encoding.encode(
        unicodedata.normalize("NFC", text), allowed_special=set(added), disallowed_special=()
    )


def of_llama3() -> Encode:
    written = re.search(r'pat_str = r"(.*?)"', (directory("llama3") / "code.txt").read_text())
    assert written is not None
    return of_ranks(rank_file("llama3", "tokenizer.model"), written[1])


def of_tekken() -> Encode:
    data = json.loads((directory("tekken") / "tekken.json").read_bytes())
    encode = of_ranks(
        {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in data["vocab"][:130_072]},
        data["config"]["pattern"],
    )
    return lambda text: [1000 + rank for rank in encode(text)]


def of_gpt2() -> Encode:
    letters = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters += [byte for byte in range(256) if byte not in letters]
    byte = {chr(byte if at < 188 else 256 + at - 188): byte for at, byte in enumerate(letters)}
    vocabulary = json.loads((directory("gpt2") / "vocab.json").read_bytes())
    del vocabulary["<|endoftext|>"]
    return of_ranks({bytes(map(byte.__getitem__, token)): rank for token, rank in vocabulary.items()}, GPT2_PATTERN)


ORIGINALS: dict[str, Callable[[], Encode]] = {
    "gpt2": of_gpt2,
    "qwen2.5": of_qwen,
    "llama3": of_llama3,
    "tekken": of_tekken,
    "mistral-v1": lambda: of_pieces("mistral-v1"),
    "mistral-v3": lambda: of_pieces("mistral-v3"),
    "deepseek": lambda: of_tokenizer_json("deepseek"),
    "gemma3": lambda: of_tokenizer_json("gemma3"),
    "qwen3": lambda: of_tokenizer_json("qwen3"),
}


@cache
def original(name: str) -> Encode:
    return ORIGINALS[name]()


def test_every_tokenizer_has_its_original() -> None:
    assert set(ORIGINALS) == set(PACKAGES)
    assert len(mixed()) == 200


@pytest.mark.parametrize("name", PACKAGES)
def test_the_ids_are_those_of_the_original_library(name: str) -> None:
    differ = [row["id"] for row in mixed() if load(name).encode(row["text"]) != original(name)(row["text"])]
    assert differ == []


HELLO = {
    "gpt2": [31373, 995],
    "qwen2.5": [14990, 1879],
    "llama3": [15339, 1917],
    "mistral-v1": [6312, 28709, 1526],
    "tekken": [29706, 4304],
}


@pytest.mark.parametrize("name", HELLO)
def test_the_ids_are_still_what_they_were(name: str) -> None:
    assert load(name).encode("hello world") == HELLO[name]


def test_qwens_two_files_agree() -> None:
    texts = [row["text"] for row in mixed() if "<think>" not in row["text"]]  # added tokens of the tokenizer.json
    assert [load("qwen2.5").encode(text) for text in texts] == [load("qwen3").encode(text) for text in texts]


# --- bytes -----------------------------------------------------------------------------------------------------------

NFC = {44, 97, 98, 99, 100, 101, 102, 103, 104, 173}  # decomposed accents and Hangul
EXCEPTIONS = {"qwen2.5": NFC, "qwen3": NFC, "gemma3": {191}, "mistral-v1": {191}, "mistral-v3": {191}}
EXPECTED = {
    "qwen2.5": lambda text: unicodedata.normalize("NFC", text),
    "qwen3": lambda text: unicodedata.normalize("NFC", text),
    **dict.fromkeys(("gemma3", "mistral-v1", "mistral-v3"), lambda text: text.replace("▁", " ")),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_bytes_give_the_text_back_or_a_reason(name: str) -> None:
    tokenizer = load(name)
    lost = set()
    for row in mixed():
        found = roundtrip(tokenizer, row["text"])
        assert found.exact == (not found.reasons)
        assert found.found.decode() == EXPECTED.get(name, str)(row["text"])
        if not found.exact:
            lost.add(int(row["id"]))
            assert list(found.reasons) == ["normalization"]
            assert tokenizer.normalizes[0] in found.reasons["normalization"]
    assert lost == EXCEPTIONS.get(name, set())


@pytest.mark.parametrize("name", PACKAGES)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=drawn())
def test_any_text_comes_back_or_is_explained(name: str, text: str) -> None:
    tokenizer = load(name)
    found = roundtrip(tokenizer, text)
    assert "unexplained" not in found.reasons
    assert found.found == EXPECTED.get(name, str)(text).encode()
    assert tokenizer.decode(found.ids).encode() == found.found
    assert found.ids == original(name)(text)


@pytest.mark.parametrize("name", PACKAGES)
def test_every_id_has_its_bytes_and_no_other_id_has_any(name: str) -> None:
    tokenizer = load(name)
    size = tokenizer.vocabulary_size
    assert size == {"gpt2": 50_257, "qwen2.5": 151_665, "llama3": 128_256, "mistral-v1": 32_000, "mistral-v3": 32_768,
                    "tekken": 131_072, "deepseek": 129_280, "gemma3": 262_145, "qwen3": 151_669}[name]  # fmt: skip
    found = tokenizer.token_bytes(range(size), at_start=False)
    assert {index for index, token in enumerate(found) if not token} == set(tokenizer.special.tokens)
    assert tokenizer.missing_bytes == b""
    for wrong in (-1, size):
        with pytest.raises(KdflowError, match=f"id {wrong} is no token of .*ids are 0 to {size - 1}; rows of a model"):
            tokenizer.token_bytes([0, wrong])


@pytest.mark.parametrize("name", PACKAGES)
def test_spellings_are_those_of_every_id_in_any_order_and_of_texts(name: str) -> None:
    tokenizer, choose = load(name), random.Random(0)
    for row in mixed():
        assert_spelling(tokenizer, tokenizer.encode(row["text"]))
    ids = sorted(tokenizer.vocabulary)
    choose.shuffle(ids)
    assert_spelling(tokenizer, ids)
    for _ in range(300):  # among them texts that begin with a space, with special tokens and with half a character
        assert_spelling(tokenizer, choose.choices(ids, k=choose.randrange(6)))


@pytest.mark.parametrize("name", ["gpt2", "deepseek", "gemma3", "qwen3"])
def test_the_bytes_of_a_token_are_those_of_its_decoder(name: str) -> None:
    """Each token alone, as far as it is whole characters: others have no text that a decoder could give."""
    tokenizer = load(name)
    backend = tokenizers.Tokenizer.from_file(str(directory(name) / "tokenizer.json")) if name != "gpt2" else None
    checked = 0
    for index in range(0, tokenizer.vocabulary_size, 7):
        [token] = tokenizer.token_bytes([index], at_start=False)
        said = backend.decode([index]) if backend else tokenizer._owner.decode([index], skip_special_tokens=True)
        if "�" not in said:
            assert said.encode() == token, index
            checked += 1
    assert checked > tokenizer.vocabulary_size / 8


def test_the_bytes_of_a_piece_are_those_of_sentencepiece() -> None:
    tokenizer = load("mistral-v1")
    model = SentencePieceProcessor(model_file=str(directory("mistral-v1") / "tokenizer.model"))
    # <unk> is written ⁇; a space that is a byte, which no text becomes, is kept at the start by sentencepiece alone.
    for index in set(range(model.get_piece_size())) - {model.unk_id(), model.piece_to_id("<0x20>")}:
        said = model.decode([index])
        if "�" not in said:
            assert tokenizer.decode([index]) == said, index
    assert tokenizer.token_bytes([3 + 0xE4, 3 + 0x20], at_start=False) == [b"\xe4", b" "]


# --- special tokens --------------------------------------------------------------------------------------------------

ROLES = {
    "gpt2": ("<|endoftext|>", "<|endoftext|>", None, "<|endoftext|>"),
    "qwen2.5": (None, "<|endoftext|>", "<|endoftext|>", None),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", None),
    "mistral-v1": ("<s>", "</s>", None, "<unk>"),
    "mistral-v3": ("<s>", "</s>", None, "<unk>"),
    "tekken": ("<s>", "</s>", "<pad>", "<unk>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", None),
    "gemma3": ("<bos>", "<end_of_turn>", "<pad>", "<unk>"),
    "qwen3": (None, "<|im_end|>", "<|endoftext|>", None),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_special_tokens_have_their_roles_and_no_bytes(name: str) -> None:
    special = load(name).special
    found = {role: None if index is None else special.tokens[index] for role, index in special.roles.items()}
    assert tuple(found.values()) == ROLES[name]
    assert tuple(found) == ("bos", "eos", "pad", "unk")
    assert set(load(name).token_bytes(special.tokens)) == {b""}
    assert not set(special.others) & set(special.roles.values())


@pytest.mark.parametrize("name", PACKAGES)
def test_text_that_looks_like_a_special_token_is_text(name: str) -> None:
    tokenizer = load(name)
    for text in [*tokenizer.special.tokens.values()][:300]:
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.tokens), text
        assert tokenizer.decode(ids) == EXPECTED.get(name, str)(text)


def test_llama3s_special_tokens_are_those_of_its_code() -> None:
    source = (directory("llama3") / "code.txt").read_text()
    listed = re.search(r"special_tokens = \[(.*?)\]", source, re.DOTALL)
    assert listed is not None
    names = re.findall(r'"(<.*?>)"', listed[1])
    assert [load("llama3").special.tokens[128_000 + at] for at in range(len(names))] == names
    assert load("llama3").special.tokens[128_255] == f"<|reserved_special_token_{2 + 255 - len(names)}|>"


def test_added_tokens_that_are_no_special_ones_are_text() -> None:
    tokenizer = load("qwen3")
    think = tokenizer.encode("<think>")
    assert len(think) == 1
    assert tokenizer.added[think[0]] == "<think>"
    assert tokenizer.token_bytes(think) == [b"<think>"]


# --- more of the same ------------------------------------------------------------------------------------------------


def test_a_tokenizer_json_in_the_manner_of_sentencepiece_is_read_as_its_model(tmp_path: Any) -> None:
    as_tokenizer_json(directory("mistral-v1") / "tokenizer.model").save(str(tmp_path / "tokenizer.json"))
    converted, pieces = kdflow.tokenizers.load(tmp_path / "tokenizer.json"), load("mistral-v1")
    assert converted.prefixes_space
    assert converted.special.roles == {"bos": 1, "eos": None, "pad": None, "unk": 0}  # its template has <s> alone
    for row in mixed():
        ids = pieces.encode(row["text"])
        assert converted.encode(row["text"]) == ids
        assert converted.token_bytes(ids) == pieces.token_bytes(ids)
        assert converted.normalized(row["text"]) == pieces.normalized(row["text"])
    assert converted.vocabulary == pieces.vocabulary
    compared = compare_vocabularies(converted, pieces)
    assert compared.same
    assert compared.shared_ids == 32_000


def test_a_tokenizer_can_be_sent_to_another_process() -> None:
    for name in ("gpt2", "llama3", "mistral-v1", "tekken"):
        sent = pickle.loads(pickle.dumps(load(name)))
        assert sent.encode("Grüße ") == load(name).encode("Grüße ")
        assert sent.token_bytes(range(500)) == load(name).token_bytes(range(500))


def test_smollm2_lacks_bytes_and_says_which() -> None:
    pytest.importorskip("gguf")
    from kdflow.models.fetch import resolve

    try:
        resolve(SMOLLM2)
    except KdflowError as error:
        pytest.skip(str(error))
    tokenizer = kdflow.tokenizers.load(SMOLLM2)  # out of kdflow's cache
    assert len(tokenizer.missing_bytes) == 21
    assert {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D} <= set(tokenizer.missing_bytes)
    lost = {row["id"]: roundtrip(tokenizer, row["text"]).reasons for row in mixed()}
    reasons = {index: reason for index, reason in lost.items() if reason}
    assert reasons == {167: {"missing bytes": "no token spells 0x04 0x06 0x1D; 3 bytes are gone"}}
    assert "missing bytes" in roundtrip(tokenizer, "a\U0004ffffb").reasons


def test_two_qwens_share_all_but_the_tokens_that_one_adds() -> None:
    found = compare_vocabularies(load("qwen2.5"), load("qwen3"))
    assert found.same
    assert (found.student_size, found.teacher_size) == (151_665, 151_669)
    assert found.shared == found.shared_ids == 151_665
    assert not found.renamed
    assert found.roles["eos"] == ("<|endoftext|>", "<|im_end|>")


def test_two_families_share_byte_strings_at_other_ids() -> None:
    found = compare_vocabularies(load("qwen3"), load("llama3"))
    assert not found.same
    assert f"id {found.shared} is " in str(found.difference)
    assert found.shared_tokens > 100_000
    reverse = compare_vocabularies(load("llama3"), load("qwen3"))
    assert (reverse.shared_tokens, reverse.shared_ids) == (found.shared_tokens, found.shared_ids)
