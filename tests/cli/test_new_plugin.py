"""``kdflow plugins new``: what it writes is a plugin, and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdflow
from kdflow.testing import check_algorithm
from tests.support.commands import Command, WriteRun
from tests.support.distributions import Distribution, plugin


def written(command: Command, site: Path, made: Path, name: str, kind: str) -> None:
    """Installs the module of a new plugin."""
    assert command("plugins", "new", name, "--kind", kind, "-o", made).code == 0
    plugin(f"kdflow_{name}", (made / f"kdflow_{name}.py").read_text()).install(site)


def test_an_algorithm_finds_its_divergence_once_among_what_a_run_loads(
    command: Command, site: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    written(command, site, tmp_path / "made", "mine", "algorithm")
    result = command("train", write_run(algorithm={"name": "mine"}), "-p", "no:forward_kl")
    assert result.code == 2
    assert "algorithm: divergence 'forward_kl' is not registered" in result.err


@pytest.mark.parametrize("kind", ["divergence", "algorithm"])
def test_a_class_may_be_called_like_one_of_kdflow(command: Command, site: Path, tmp_path: Path, kind: str) -> None:
    written(command, site, tmp_path / "made", "loss_sum", kind)
    check_algorithm("loss_sum")


@pytest.mark.parametrize("kind", ["divergence", "algorithm"])
def test_the_package_is_a_plugin_and_passes_its_tests(command: Command, site: Path, tmp_path: Path, kind: str) -> None:
    made = tmp_path / "made"
    result = command("plugins", "new", "first_try", "--kind", kind, "-o", made)
    assert result.code == 0
    assert f"pip install -e {made}\n" in result.out
    project = tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert project["name"] == "kdflow-first-try"
    source = (made / "kdflow_first_try.py").read_text()
    Distribution(project["name"], {"kdflow_first_try": source}, project["entry-points"]["kdflow"]).install(site)
    assert kdflow.get_algorithm("first_try").name == "first_try"
    paths = os.pathsep.join([str(site), *sys.path])
    own = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(made)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert own.returncode == 0, own.stdout + own.stderr
    assert "passed" in own.stdout


def test_without_an_output_it_is_named_after_the_plugin(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("plugins", "new", "mine").code == 0
    assert (tmp_path / "kdflow-mine" / "kdflow_mine.py").exists()


def test_refusals(command: Command, tmp_path: Path) -> None:
    assert "'My-X' cannot name a plugin" in command("plugins", "new", "My-X").err
    for name in ("none", "null", "a_", "a__b", "_a"):
        assert f"'{name}' cannot name a plugin" in command("plugins", "new", name).err
    for name in ("tvd", "sorted_l1"):  # a plugin, and what another one brings
        assert f"there is a plugin '{name}' already, of kdflow" in command("plugins", "new", name).err
    (tmp_path / "there").mkdir()
    assert "cannot be made: File exists" in command("plugins", "new", "mine", "-o", tmp_path / "there").err
    assert not list((tmp_path / "there").iterdir())
