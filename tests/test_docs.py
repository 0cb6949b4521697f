"""What the pages of docs/ show is what there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import kdflow
from kdflow import config, plugins

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "cross-tokenizer.md").read_text(encoding="utf-8")
ALIGNING = {entry.name: kdflow.get_algorithm(entry.name) for entry in plugins.load().of_kind("algorithm")
            if "aligner" in kdflow.get_algorithm(entry.name).needs}  # fmt: skip


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    return found[1]


def first_cells(heading: str) -> set[str]:
    return set(re.findall(r"^\| \[?`(\w+)`", section(heading), flags=re.MULTILINE))


def test_links_lead_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
        assert [target for target in targets if not (DOCS / target).exists()] == []


def test_headings_are_listed() -> None:
    listed = re.findall(r"^\* \[.+\]\(#(.+)\)$", PAGE, flags=re.MULTILINE)
    headings = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    assert listed == [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_every_algorithm_between_tokenizers_and_every_aligner_has_a_row() -> None:
    assert set(ALIGNING) == {"dskd", "min_edit", "overlap", "uld"} <= first_cells("Which algorithm")
    assert first_cells("Aligners") == {entry.name for entry in plugins.load().of_kind("aligner")}


def test_every_option_of_theirs_has_a_row() -> None:
    told = set()
    for options, owners in re.findall(r"^\| (`.+?`) \| (all|`.+?`) \|", section("Which algorithm"), flags=re.MULTILINE):
        names = ALIGNING if owners == "all" else re.findall(r"`(\w+)`", owners)
        told |= {(name, option) for name in names for option in re.findall(r"`(\w+)`", options)}
    assert told == {(name, option) for name, cls in ALIGNING.items() for option in cls.Options.model_fields}


def test_the_sections_of_a_run_file_are_valid(run_file: Callable[..., dict[str, Any]]) -> None:
    algorithm = yaml.safe_load(block("yaml"))["algorithm"]
    resolved = config.load(run_file(algorithm=algorithm)).resolve(plugins.load())
    assert resolved.algorithm.options()["divergence"] == {"name": "jsd", "beta": 0.3}


def test_the_python_gives_what_it_says() -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    ((call, result),) = re.findall(r"^(aligner\..+?)  # (.+)$", block("python"), flags=re.MULTILINE)
    assert eval(call, names) == eval(result)
