"""Tiny distributions, as pip installs them: modules, and a dist-info with METADATA, entry_points.txt and RECORD."""

from __future__ import annotations

import configparser
import hashlib
import importlib
import io
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

# The class of the architecture's "a third-party divergence is a class and five lines".
SQUARED = '''
import kdflow

class Squared(kdflow.Divergence):
    """Squared difference of probabilities."""
    name = "squared"
    class Options(kdflow.Options):
        factor: float = 1.0
    def per_token(self, student_logits, teacher_logits):
        return self.options.factor * (student_logits.softmax(-1) - teacher_logits.softmax(-1)).square().sum(-1)

@kdflow.hookimpl
def kdflow_divergences():
    return [Squared]
'''

# An algorithm with a module of its own, the format of its data, and a tracker: everything a plugin can bring to a run.
MIMIC = '''
from typing import ClassVar

import kdflow
import torch
from kdflow.contracts import DatasetReader, LossSum, Sample, Tracker

class Mimic(kdflow.Algorithm):
    """Squared distance between projected hidden states and the teacher's."""
    name = "mimic"
    paper = "https://example.org/mimic"
    needs = frozenset({"teacher", "same_vocabulary"})
    class Options(kdflow.Options):
        weight: float = 1.0
    def build(self, student, teacher):
        return torch.nn.Linear(student.hidden_size, teacher.hidden_size)
    def loss(self, student, teacher, batch):
        distance = self.module(student.rows).float() - teacher.rows.float()
        squared = self.options.weight * distance.square().mean(-1).sum()
        return LossSum(squared, {"distance": (squared, float(len(teacher.rows)))})

class Line(DatasetReader):
    name = "line"
    def read(self, record):
        if "line" not in record:
            raise ValueError("the field 'line' is missing")
        return Sample(response=record["line"])

class Losses(Tracker):
    name = "losses"
    def start(self, directory, run, first_step):
        self.file = (directory / "losses.txt").open("a")
    def event(self, event):
        if event["event"] == "step":
            print(event["loss"], file=self.file)
    def close(self):
        self.file.close()

@kdflow.hookimpl
def kdflow_algorithms():
    return [Mimic]

@kdflow.hookimpl
def kdflow_datasets():
    return [Line]

@kdflow.hookimpl
def kdflow_trackers():
    return [Losses]
'''


def divergence(name: str, value: float = 1.0) -> str:
    """A plugin module with one divergence: ``value`` times the total variation."""
    return f'''
import kdflow

class Third(kdflow.Divergence):
    name = "{name}"
    def per_token(self, student_logits, teacher_logits):
        return {value} * (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1)

@kdflow.hookimpl
def kdflow_divergences():
    return [Third]
'''


@dataclass(frozen=True)
class Distribution:
    """A distribution of single-file modules."""

    name: str
    modules: Mapping[str, str]
    """Name → source."""
    entry_points: Mapping[str, str] = field(default_factory=dict)
    """Name → module, of the group ``kdflow``."""
    version: str = "1.0"

    def install(self, site: Path) -> None:
        """Put it into ``site``, in place of one of the same name."""
        for path, content in self._files().items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_bytes(content)
        importlib.invalidate_caches()

    def wheel(self, directory: Path) -> Path:
        """Build a wheel of it."""
        path = directory / f"{self._stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in self._files().items():
                archive.writestr(name, content)
        return path

    @property
    def _stem(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}"

    def _files(self) -> dict[str, bytes]:
        info = f"{self._stem}.dist-info"
        entries = "".join(f"{name} = {module}\n" for name, module in self.entry_points.items())
        texts = {
            **{f"{module}.py": source for module, source in self.modules.items()},
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/entry_points.txt": f"[kdflow]\n{entries}" if entries else "",
        }
        files = {name: text.encode() for name, text in texts.items()}
        record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
        return {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}


def plugin(module: str, source: str, *, distribution: str | None = None, entry_point: str | None = None,
           version: str = "1.0") -> Distribution:  # fmt: skip
    """A distribution of one module, named after it unless told otherwise: ``kdflow_squared`` → ``squared``."""
    name = entry_point or module.removeprefix("kdflow_")
    return Distribution(distribution or module.replace("_", "-"), {module: source}, {name: module}, version)


def strip_kdflow(site: Path) -> None:
    """Shadow kdflow's own dist-info with a copy that lacks the entry points of the group ``kdflow``.

    The code is the same, but ``importlib.metadata`` takes the first distribution of a name on the path.
    """
    own = metadata.distribution("kdflow")
    sections = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    sections.optionxform = str  # type: ignore[assignment,method-assign]
    sections.read_string(own.read_text("entry_points.txt") or "")
    if not sections.remove_section("kdflow"):
        raise AssertionError("kdflow is installed without entry points of its own")
    text = io.StringIO()
    sections.write(text)
    info = site / f"kdflow-{own.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(own.read_text("METADATA") or "", encoding="utf-8")
    (info / "entry_points.txt").write_text(text.getvalue(), encoding="utf-8")
    importlib.invalidate_caches()


def _digest(content: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
