"""What kdflow.tokenizers.load makes of paths, contents and names."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

import kdflow
from kdflow.contracts import KdflowError
from kdflow.hub import cached
from kdflow.tokenizers import load, roundtrip
from kdflow.tokenizers.families import FAMILIES, Family
from tests.models.test_fetch import Hub
from tests.support.hub import hub
from tests.support.models import make_tokenizer
from tests.support.small import (
    PATTERN,
    ranks,
    write_ranks,
    write_sentencepiece,
    write_tekken,
    write_tokenizer_json,
)

TEXT = " The the  them 你 e\u0301 <|im_end|> <s>\n"


def refused(*arguments: object, **options: str) -> str:
    with pytest.raises(KdflowError) as caught:
        load(*arguments, **options)  # type: ignore[arg-type]
    return str(caught.value)


# --- each kind -------------------------------------------------------------------------------------------------------


def test_a_hugging_face_directory_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    tokenizer = load(write_tokenizer_json(tmp_path))
    known = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(TEXT) == known.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.special.roles == {"bos": 0, "eos": 2, "pad": 2, "unk": None}
    assert tokenizer.special.tokens == {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
    assert tokenizer.special.others == {1: "<|im_start|>"}
    assert tokenizer.vocabulary_size == 384


def test_a_tokenizer_json_alone_knows_fewer_roles(tmp_path: Path) -> None:
    folder = write_tokenizer_json(tmp_path, bos=True)
    whole, bare = load(folder), load(folder / "tokenizer.json")
    assert bare.encode(TEXT) == whole.encode(TEXT)
    assert bare.vocabulary == whole.vocabulary
    assert bare.special.roles == {"bos": 0, "eos": None, "pad": None, "unk": None}
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).special.roles == bare.special.roles  # transformers cannot load a directory without a config


def test_truncation_and_padding_of_a_tokenizer_json_are_left_out(tmp_path: Path) -> None:
    backend = make_tokenizer().backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=20, pad_id=2, pad_token="<|im_end|>")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path / "tokenizer.json")
    expected = make_tokenizer().encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    for text, ids in ((TEXT, expected), ("a", make_tokenizer().encode("a"))):
        assert tokenizer.encode(text) == ids
    assert tokenizer.special.pad == 2


def test_vocab_and_merges_are_a_directory_of_transformers(tmp_path: Path) -> None:
    backend = make_tokenizer().backend_tokenizer
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the thing ")) == "the thing "
    (tmp_path / "merges.txt").unlink()
    assert "holds none; expected tokenizer.json, tekken.json, " in refused(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "some.model"])
def test_a_sentencepiece_model_is_read_by_its_own_library(tmp_path: Path, name: str) -> None:
    import sentencepiece

    path = write_sentencepiece(tmp_path / name)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for given in (path, str(path), tmp_path):
        tokenizer = load(given)
        assert tokenizer.encode(TEXT) == original.encode(TEXT)
    assert tokenizer.special.roles == {"bos": 1, "eos": 2, "pad": None, "unk": 0}
    assert tokenizer.token_bytes([1, 2, 0, 3 + 0xE4]) == [b"", b"", b"", b"\xe4"]
    assert tokenizer.prefixes_space


def test_a_rank_file_needs_a_pattern_unless_its_family_is_known(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "own.tiktoken")
    message = refused(path)
    assert f"{path} (SHA-256 " in message
    assert "kdflow.tokenizers.load(path, pattern=...)" in message
    original = tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
    for given in (path, tmp_path):
        tokenizer = load(given, pattern=PATTERN)
        assert tokenizer.encode(TEXT) == original.encode_ordinary(TEXT)
    assert tokenizer.token_bytes(tokenizer.encode(" the你")) == [b" ", b"the", "你".encode()]
    assert tokenizer.special.tokens == {}
    assert "tiktoken refuses the pattern '(': " in refused(path, pattern="(")


def test_a_known_rank_file_keeps_its_tokens_under_another_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_ranks(tmp_path / "own.tiktoken")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    family = Family("(", special=("<end>",), added=("<think>",), roles={"eos": "<end>"})
    monkeypatch.setitem(FAMILIES, digest, family)
    tokenizer = load(path, pattern=PATTERN)
    assert tokenizer.special.eos == 265
    assert tokenizer.encode("the<think><end>") == [258, 266, *b"<end>"], "an added token is text, a special one is not"
    assert tokenizer.token_bytes([258, 266, 265]) == [b"the", b"<think>", b""]


def test_a_sentencepiece_model_with_spaces_behind_words_is_refused(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "tokenizer.model", treat_whitespace_as_suffix=True)
    assert f"{path} writes spaces behind words instead of before them" in refused(path)


def test_a_tiktoken_file_is_told_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    tokenizer = load(write_ranks(tmp_path / "tokenizer.model"), pattern=PATTERN)
    assert type(tokenizer).__name__ == "RankTokenizer"
    assert tokenizer.encode("the") == [ranks()[b"the"]]


def test_tekken_puts_special_tokens_first_and_uses_the_first_ranks(tmp_path: Path) -> None:
    tokenizer = load(write_tekken(tmp_path / "tekken.json"))
    assert tokenizer.vocabulary_size == 268
    assert tokenizer.encode("the 你") == [8 + 258, 8 + 32, 8 + 0xE4, 8 + 0xBD, 8 + 0xA0]  # 你 has a rank past the used
    assert tokenizer.special.tokens[3] == "[INST]"
    assert tokenizer.special.roles == {"bos": 1, "eos": 2, "pad": None, "unk": 0}
    listed = [{"rank": 0, "token_str": "<unk>", "is_control": True}, {"rank": 5, "token_str": "<s>"}]
    own = load(write_tekken(tmp_path / "tekken.json", special_tokens=listed))
    assert own.special.tokens[5] == "<s>"
    assert own.special.tokens[1] == "<SPECIAL_1>"
    assert own.special.bos == 5


def test_the_best_description_of_a_directory_is_taken(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model")
    assert load(tmp_path).vocabulary_size == 400
    write_ranks(tmp_path / "own.tiktoken")
    assert load(tmp_path, pattern=PATTERN).vocabulary_size == 265
    write_tekken(tmp_path / "tekken.json")
    assert load(tmp_path).vocabulary_size == 268
    write_tokenizer_json(tmp_path)
    assert load(tmp_path).vocabulary_size == 384


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_is_looked_up_in_kdflows_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path))
    message = refused("some/model")
    assert f"'some/model' is no local path, kdflow's cache has no model at {cached('some/model')}, " in message
    assert "Hugging Face hub gave none: not asked, since HF_HUB_OFFLINE is set" in message
    write_tokenizer_json(cached("some/model"))
    assert load("some/model").vocabulary_size == 384


def test_a_name_is_looked_up_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    write_tokenizer_json(folder / "snapshots" / ("a" * 40))
    assert load("some/model").vocabulary_size == 384


def test_of_a_hub_id_only_the_tokenizer_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_tokenizer_json(tmp_path / "made")
    files = {file.name: file.read_bytes() for file in made.iterdir()} | {"config.json": b"{}"}
    weights = {"model.safetensors": b"weights", "onnx/tokenizer.json": b"{}", "model.safetensors.index.json": b"{}"}
    monkeypatch.setattr(Hub, "files", {**files, **weights})
    home = {"KDFLOW_CACHE": str(tmp_path / "kdflow"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    code = "import kdflow; print(kdflow.tokenizers.load('org/name').vocabulary_size)"
    with hub(Hub) as endpoint:
        environment = {**os.environ, **home, "HF_ENDPOINT": endpoint}
        for _ in range(2):
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
            assert done.stdout == "384\n", done.stderr
        assert "fetching" not in done.stderr  # the second time it was in the hub's cache
    fetched = {path.name for path in (tmp_path / "hf").rglob("*.*") if path.is_symlink()}
    assert fetched == set(files)


@pytest.mark.parametrize("name", ["/no/such", "./no-such", "~/no-such", "a/b/c", ""])
def test_what_is_no_path_and_no_name(name: str) -> None:
    assert refused(name).startswith(f"tokenizer not found: there is no '{name}' (/")


# --- damage and what is missing --------------------------------------------------------------------------------------

DAMAGED = {
    "no JSON": ("tokenizer.json", b"{", "is no tokenizer.json of the tokenizers library"),
    "another JSON": ("tokenizer.json", b'{"a": 1}', "is no tokenizer.json of the tokenizers library"),
    "half a tekken.json": ("tekken.json", b'{"vocab": [{"token_bytes": "YQ=="', "is no tekken.json: expected the keys"),
    "a tekken.json without config": ("tekken.json", b'{"vocab": [{"token_bytes": "YQ=="}]}', "KeyError: 'config'"),
    "an empty model": ("tokenizer.model", b"", "is neither a sentencepiece model nor a tiktoken file"),
    "a pointer of Git LFS": (
        "tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "or a pointer of Git LFS?",
    ),
    "ranks that break off": ("a.tiktoken", b"IQ== 0\nIg==", "a.tiktoken, line 2: expected a token in base64"),
    "ranks of no base64": ("a.tiktoken", b"IQ== 0\nIg== 1\nI 2\n", "a.tiktoken, line 3: expected a token in base64"),
    "no ranks": ("a.tiktoken", b"", "a.tiktoken holds no ranks"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    options = {"pattern": PATTERN} if name.endswith(".tiktoken") else {}
    said = refused(tmp_path / name, **options)
    assert said.startswith(str(tmp_path / name))
    assert message in said


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="this system has no file that cannot be read")
def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(KdflowError, match=r"^the tokenizer /proc/self/mem cannot be read: .*; mend it, or give anoth"):
        load("/proc/self/mem")


def test_a_directory_that_transformers_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert f"{tmp_path} holds a tokenizer that transformers cannot load: " in refused(tmp_path)


def test_a_decoder_that_is_not_known_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    assert 'its decoder has the step {"type": "WordPiece"' in refused(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("write", [write_ranks, write_tekken])
def test_without_tiktoken_the_command_that_installs_it_is_named(tmp_path: Path, write: object) -> None:
    path = write(tmp_path / ("tekken.json" if write is write_tekken else "own.tiktoken"))  # type: ignore[operator]
    code = (
        f"import sys; sys.modules['tiktoken'] = None; import kdflow\nkdflow.tokenizers.load({str(path)!r}, pattern='.')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f'{path} is read by the tiktoken library, which is not installed; run: pip install "kdflow[tiktoken]"' in (
        done.stderr
    )


def test_loading_a_sentencepiece_model_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "tokenizer.model")
    code = (
        f"import sys, kdflow; print(kdflow.tokenizers.load({str(path)!r}).decode([300]))\n"
        "print(*{'torch', 'transformers', 'tokenizers', 'tiktoken', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == ""


def test_it_is_a_public_name() -> None:
    assert kdflow.tokenizers.load is load


# --- what a tokenizer.json may hold ----------------------------------------------------------------------------------


def saved(tmp_path: Path, backend: Tokenizer) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_normalizers_are_named(tmp_path: Path) -> None:
    backend = make_tokenizer().backend_tokenizer
    steps = [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace("x", "y")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = load(saved(tmp_path, backend))
    assert tokenizer.normalizes == ("NFC", "Lowercase", "'x' to 'y'", "a space before the text")
    assert tokenizer.normalized("Axe\u0301") == " ayé".encode()


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_metaspace_puts_a_space_before_a_text_or_does_not(tmp_path: Path, scheme: str) -> None:
    pieces = ["<unk>", "▁", "a", "b", "▁a", *map("<0x{:02X}>".format, range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    metaspace = decoders.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    tokenizer = load(saved(tmp_path, backend))
    assert tokenizer.prefixes_space == (scheme == "first")
    assert tokenizer.special.unk == 0
    for text in ("a b", "ab\n a", "b", ""):
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(ids)) == text.encode()
        assert tokenizer.token_bytes(ids[1:], at_start=False) == [tokenizer.vocabulary[index] for index in ids[1:]]


def test_special_pieces_of_a_unigram_model_stand_for_no_text(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("▁", -2.0), ("b", -1.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.add_special_tokens(["</s>", "<unk>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path / "tokenizer.json")
    assert tokenizer.token_bytes([1, 0, 2, 3, 4]) == [b"", b"", b"a", b" ", b"b"]


def test_a_unigram_model_names_its_unknown_token(tmp_path: Path) -> None:
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0)], unk_id=1))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = load(saved(tmp_path, backend))
    assert tokenizer.special.unk == 1
    assert tokenizer.token_bytes(tokenizer.encode("a b")) == [b"a", b" ", b""]
    assert list(roundtrip(tokenizer, "a b").reasons) == ["unknown token"]


def test_an_added_token_may_be_one_of_the_vocabulary_with_a_role(tmp_path: Path) -> None:
    """Padding with "!" makes it special, and a text may still hold it."""
    made = make_tokenizer()
    made.pad_token = "!"
    made.save_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    assert tokenizer.special.tokens[tokenizer.special.pad or 0] == "!"
    assert tokenizer.decode(tokenizer.encode("Oh! No!")) == "Oh! No!"


def test_a_tokenizer_json_may_hold_a_token_called_token_bytes(tmp_path: Path) -> None:
    made = make_tokenizer()
    made.add_tokens(["token_bytes"])
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][-1]["content"] == "token_bytes"
    assert load(tmp_path / "tokenizer.json").added == {384: "token_bytes"}
