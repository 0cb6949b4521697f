"""``kdflow plugins new``: what it writes is a plugin, and passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdflow
from tests.support.commands import Command
from tests.support.distributions import Distribution


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
    for name in ("none", "a_", "a__b", "_a"):
        assert f"'{name}' cannot name a plugin" in command("plugins", "new", name).err
    for name in ("tvd", "sorted_l1"):  # a plugin, and what another one brings
        assert f"there is a plugin '{name}' already, of kdflow" in command("plugins", "new", name).err
    (tmp_path / "there").mkdir()
    assert "cannot be made: File exists" in command("plugins", "new", "mine", "-o", tmp_path / "there").err
    assert not list((tmp_path / "there").iterdir())
