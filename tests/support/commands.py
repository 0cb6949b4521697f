"""The command line: in this process, which is quick, and in one of its own, which is what users have."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kdflow.cli

REPOSITORY = Path(kdflow.cli.__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``kdflow …`` in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            kdflow.cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(int(caught.value.code or 0), out, err)

    return run


def python(*arguments: object, path: Sequence[Path] = (), cwd: Path | None = None,
           env: Mapping[str, str] | None = None) -> Result:  # fmt: skip
    """Run this Python in a process of its own, with ``path`` before everything else."""
    places = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places), **(env or {})}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment, text=True, encoding="utf-8",
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=300, check=False)  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def kdflow_process(*arguments: object, **options: Any) -> Result:
    """Run ``python -m kdflow …`` in a process of its own."""
    return python("-m", "kdflow", *arguments, **options)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A site-packages of its own, first on this process's path; what was imported from it is forgotten afterwards."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    yield directory
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{directory}{os.sep}"):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(run_file: Callable[..., dict[str, Any]], tmp_path: Path) -> WriteRun:
    """Writes ``run.yaml`` over the tiny models, with sections merged in; ``None`` takes a section out."""

    def write(**sections: Any) -> Path:
        run = {key: value for key, value in run_file(**sections).items() if value is not None}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        return path

    return write
