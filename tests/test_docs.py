"""What the pages of docs/ show is what there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


def test_what_many_machines_cost_on_paper_follows_from_the_formulas() -> None:
    text = (DOCS / "many-machines.md").read_text(encoding="utf-8").split("\n## What it costs, on paper\n")[1]
    rows = re.findall(r"^\| (\S+)B \| (\d+) on .*? \| (\d+) \|(.*)\|$", text, flags=re.MULTILINE)
    assert len(rows) == 8
    vocabulary, tokens = 151936, 4 * 8192

    def parameters(hidden: int, layers: int, heads: int, inner: int) -> tuple[int, int]:
        return layers * hidden * (2 * 128 * heads + 2 * 128 * 8 + 3 * inner), vocabulary * hidden

    teacher, teacher_head = parameters(2560, 36, 32, 9728)
    for size, ranks, replicas, rest in rows:
        blocks, head = parameters(*{"0.6": (1024, 28, 16, 3072), "1.7": (2048, 28, 16, 6144)}[size])
        share = int(ranks) // int(replicas)
        micro = (2 * (2 * blocks + head) + 4 * (blocks + head)) * (share - 1) / share
        between = 8 * (blocks + head) / share * (int(replicas) - 1) / int(replicas)
        links = 4 * micro / (3e11 if share <= 8 else 4e10) + between / 4e10
        flop = tokens * (6 * blocks + 2 * teacher) + tokens / 2 * (6 * head + 2 * teacher_head)
        found = [float(cell.replace(",", "") or 0) for cell in rest.replace(" ", "").split("|")]
        assert found == pytest.approx([micro / 1e9, between / 1e9, links * 1e3, flop / 415e9], rel=0.02, abs=0.05)
