"""What ``kdflow plugins new`` writes: a package that works, to be changed."""

from __future__ import annotations

import keyword
import re
import shlex
from enum import StrEnum
from pathlib import Path
from string import Template

from kdflow.config.yaml_file import parse
from kdflow.contracts import KdflowError
from kdflow.plugins import installed, load


class Kind(StrEnum):
    """What the new plugin brings."""

    divergence = "divergence"
    algorithm = "algorithm"


_PROJECT = Template("""[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
description = "The $kind $name for kdflow."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["kdflow>=0.1"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.kdflow]
$name = "$module"

[tool.hatch.build.targets.wheel]
only-include = ["$module.py"]
""")

_README = Template("""# $package

The $kind `$name` for kdflow.

```sh
pip install -e '.[test]'
kdflow algorithms show $name
kdflow train run.yaml algorithm='{name: $name}'
pytest
```
""")

_DIVERGENCE = Template('''"""The divergence ``$name``."""

import kdflow


class $cls(kdflow.Divergence):
    """Squared difference of probabilities: say here what yours is, and from which paper and equation."""

    name = "$name"

    class Options(kdflow.Options):
        """What a run file may set."""

        factor: float = 1.0

    def per_token(self, student_logits, teacher_logits):
        """One value for each row of logits ``[n, V]``, which are divided by the temperature already."""
        difference = student_logits.softmax(-1) - teacher_logits.softmax(-1)
        return self.options.factor * difference.square().sum(-1)


@kdflow.hookimpl
def kdflow_divergences():
    """What kdflow finds here."""
    return [$cls]
''')

_ALGORITHM = Template('''"""The algorithm ``$name``."""

import kdflow
from kdflow import contracts, ops


class $cls(kdflow.Algorithm):
    """Forward KL from the teacher: say here what yours is, and from which paper and equation."""

    name = "$name"
    needs = frozenset({"teacher", "same_vocabulary"})

    class Options(kdflow.Options):
        """What a run file may set."""

        temperature: float = 1.0

    def __init__(self, options=None):
        super().__init__(options)
        self.divergence = kdflow.get_divergence("forward_kl", temperature=self.options.temperature)

    def loss(self, student, teacher, batch):
        """A sum over the target tokens of a micro-batch: the runtime divides by those of the whole step."""
        total = ops.divergence_sum(student.rows, student.head, teacher.rows, teacher.head, self.divergence)
        return contracts.LossSum(total)


@kdflow.hookimpl
def kdflow_algorithms():
    """What kdflow finds here."""
    return [$cls]
''')

_TESTS = {
    Kind.divergence: Template("""import kdflow
from kdflow.testing import check_algorithm, check_divergence, tiny_run
from $module import $cls


def test_it_is_a_divergence():
    check_divergence($cls())


def test_its_options_count():
    check_algorithm("$name", {"factor": 2.0})


def test_a_run(tmp_path):
    result = kdflow.train(tiny_run(tmp_path, algorithm={"name": "$name"}))
    assert result.steps == 4
"""),
    Kind.algorithm: Template("""import kdflow
from kdflow.testing import check_algorithm, tiny_run


def test_its_loss_is_a_sum():
    check_algorithm("$name")
    check_algorithm("$name", {"temperature": 2.0})


def test_a_run(tmp_path):
    result = kdflow.train(tiny_run(tmp_path, algorithm={"name": "$name"}))
    assert result.steps == 4
"""),
}


def write_plugin(name: str, kind: Kind, output: Path | None) -> str:
    """Write the package of a plugin; says what to do with it.

    Raises:
        KdflowError: it cannot be called so, or the directory cannot be made.
    """
    cls = "".join(part.title() for part in name.split("_"))
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(cls) or parse(name) != name:
        raise KdflowError(
            f"'{name}' cannot name a plugin; use small letters, digits and single _ between them, begin with a letter, "
            "and leave none, true and false to Python, and null to YAML"
        )
    brought = (entry for entry in load().of_kind("algorithm", "divergence") if entry.name == name)
    taken = (*(one for one in installed() if one.name == name), *(entry.plugin for entry in brought))
    if taken:
        raise KdflowError(f"there is a plugin '{name}' already, of {taken[0].distribution}; choose another name")
    package, module = f"kdflow-{name.replace('_', '-')}", f"kdflow_{name}"
    words = {"name": name, "package": package, "module": module, "kind": kind.value, "cls": cls}
    files = {
        "pyproject.toml": _PROJECT, "README.md": _README, f"tests/test_{name}.py": _TESTS[kind],
        f"{module}.py": _DIVERGENCE if kind is Kind.divergence else _ALGORITHM,
    }  # fmt: skip
    directory = output or Path(package)
    try:
        directory.mkdir(parents=True)
        (directory / "tests").mkdir()
        for file, template in files.items():
            (directory / file).write_text(template.substitute(words), encoding="utf-8")
    except OSError as error:
        raise KdflowError(f"{directory} cannot be made: {error.strerror}; give another -o") from None
    at = shlex.quote(str(directory))
    return (
        f"{directory / module}.py is the {kind.value}, yours to change. Next:\n"
        f"  pip install -e {at}\n  kdflow algorithms show {name}\n  pytest {at}"
    )
