"""What the commands print and write."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdflow
from kdflow.cli import quickstart
from kdflow.models.loading import cut_depth, load_model
from kdflow.runtime.checkpoint import MANIFEST, RUN_STATE, load_tensors, write_manifest
from tests.support.commands import Command, WriteRun, kdflow_process, python
from tests.support.distributions import SQUARED, plugin
from tests.support.models import write_jsonl

ESCAPE = "\x1b["


# --- versions, help, completion --------------------------------------------------------------------------------------


def test_version(command: Command, site: Path) -> None:
    result = command("--version")
    assert (result.code, result.out, result.err) == (0, f"kdflow {kdflow.__version__}\n", "")
    plugin("kdflow_squared", SQUARED, version="0.3").install(site)
    assert command("--version").out == f"kdflow {kdflow.__version__}\nplugin kdflow-squared 0.3\n"


def test_help_names_every_command(command: Command) -> None:
    result = command("--help")
    assert result.code == 0
    for name in (
        "quickstart",
        "check",
        "train",
        "export",
        "report",
        "align",
        "plugins",
        "algorithms",
        "-p",
        "--version",
    ):
        assert name in result.out
    for name in ("quickstart", "check", "train", "export", "report", "align", "plugins", "algorithms"):
        assert command(name, "--help").code == 0


def test_no_command_is_a_request_for_help(command: Command) -> None:
    assert "Usage: kdflow" in command().out + command().err


def test_an_unknown_command_is_told_the_nearest(command: Command) -> None:
    result = command("trian", "run.yaml")
    assert result.code == 2
    assert "train" in result.err


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """A command sets up logging for its process; here, the tests' own is put back."""
    root, own = logging.getLogger(), logging.getLogger("kdflow")
    before = root.handlers[:], root.level, own.level
    root.handlers.clear()
    yield
    root.handlers[:], root.level, own.level = before


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = python("-m", "kdflow", env={"_KDFLOW_COMPLETE": f"source_{shell}"})
    assert result.code == 0, result.err
    assert f"complete_{shell}" in result.out
    if shutil.which(shell):  # the shell itself accepts it
        subprocess.run([shell, "-n"], input=result.out, text=True, check=True)


@pytest.mark.parametrize(("words", "expected"), [
    ("kdflow ", {
        "check", "evaluate", "cache", "generate", "train", "export", "report", "align", "plugins", "algorithms",
        "quickstart",
    }),
    ("kdflow al", {"algorithms", "align"}), ("kdflow align --aligner by", {"byte_span"}),
    ("kdflow algorithms ", {"list", "show"}), ("kdflow plugins ", {"list", "show", "new"}),
    ("kdflow train --re", {"--resume"}),
    ("kdflow -v algorithms show skew", {"skew_kl", "skew_reverse_kl"}), ("kdflow plugins show jsd", {"jsd"}),
])  # fmt: skip
def test_completions(words: str, expected: set[str]) -> None:
    count = len(words.split(" ")) - 1
    result = python(
        "-m", "kdflow", env={"_KDFLOW_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    )
    assert set(result.out.split()) == expected, result.err


# --- what is logged --------------------------------------------------------------------------------------------------

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "


@pytest.mark.parametrize("arguments", ["-v train", "--verbose train", "train -v", "train --verbose"])
def test_verbose_before_and_after_the_command(
    command: Command, write_run: WriteRun, logging_restored: None, arguments: str
) -> None:
    first, *rest = arguments.split()
    result = command(first, *rest, write_run(training={"steps": 1}))
    assert result.code == 0
    assert re.search(rf"^{TIME}INFO kdflow: .*step-00000001 is written$", result.err, re.MULTILINE)
    assert "DEBUG" not in result.err
    assert "INFO" not in result.out


def test_it_is_quiet_unless_told(command: Command, write_run: WriteRun, logging_restored: None) -> None:
    assert command("train", write_run(training={"steps": 1})).err == ""


@pytest.mark.parametrize("arguments", [["-vv"], ["-v", "-v"], ["-v", "--verbose"]])
def test_verbose_twice_tells_every_event(
    command: Command, write_run: WriteRun, logging_restored: None, arguments: list[str]
) -> None:
    before, after = arguments[:1], arguments[1:]
    result = command(*before, "train", write_run(training={"steps": 1}), *after)
    assert re.search(rf"^{TIME}DEBUG kdflow: step: {{'step': 1, 'loss': ", result.err, re.MULTILINE)
    assert re.search(rf"^{TIME}DEBUG kdflow: plugin 'jsd' of .* provides divergence jsd$", result.err, re.MULTILINE)


def test_verbose_tells_which_plugins_failed_and_which_rank_speaks(
    command: Command, site: Path, logging_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("kdflow_broken", "import a_module_that_is_not_there").install(site)
    monkeypatch.setenv("RANK", "3")
    told = command("-v", "algorithms", "list").err
    assert re.search(rf"^{TIME}rank 3 INFO kdflow: plugin 'broken' of .* failed to load: ModuleNotFound", told)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_algorithms_show(command: Command) -> None:
    result = command("algorithms", "show", "jsd")
    assert result.code == 0
    for fragment in (
        "jsd (divergence of kdflow)", "KL(T‖M)", "same_vocabulary, teacher", "https://arxiv.org/abs/2306.13649", "beta",
        "≥ 0", "≤ 1", "0.5", "Weight of the teacher in the mixture", "temperature", "ce_weight",
    ):  # fmt: skip
        assert fragment in result.out
    assert "needs: nothing" in command("algorithms", "show", "sft").out


def test_algorithms_show_as_json(command: Command) -> None:
    shown = json.loads(command("algorithms", "show", "jsd", "--json").out)
    assert {key: shown[key] for key in ("name", "kind", "needs", "paper", "distribution", "version")} == {
        "name": "jsd", "kind": "divergence", "needs": ["same_vocabulary", "teacher"], "distribution": "kdflow",
        "paper": "https://arxiv.org/abs/2306.13649", "version": kdflow.__version__,
    }  # fmt: skip
    assert set(shown["options"]) == {"beta", "temperature", "scale_by_temperature_squared", "ce_weight"}
    assert shown["options"]["beta"] == {
        "type": "float, ≥ 0, ≤ 1", "required": False, "default": 0.5,
        "description": "Weight of the teacher in the mixture (TRL's β; it is 1 - β in DistiLLM and arXiv 2603.01875).",
    }  # fmt: skip
    assert shown["description"].startswith("β·KL(T‖M) + (1 - β)·KL(S‖M)")


OPTIONS = """
from pathlib import Path
from typing import Literal

from pydantic import Field

class Inner(kdflow.Options):
    size: int = 1

class Rich(kdflow.Divergence):
    name = "rich"
    class Options(kdflow.Options):
        layers: list[int] = Field(default_factory=lambda: [1, 2])
        inner: Inner = Inner()
        where: Path = Path("x")
        kinds: frozenset[str] = frozenset({"a"})
        mode: Literal["same", "other"] | None = None
        wanted: float
    def per_token(self, student_logits, teacher_logits):
        return (student_logits - teacher_logits).sum(-1)

@kdflow.hookimpl
def kdflow_divergences():
    return [Rich]
"""


def test_algorithms_show_of_options_of_every_type(command: Command, site: Path) -> None:
    plugin("kdflow_rich", f"import kdflow\n{OPTIONS}").install(site)
    shown = json.loads(command("algorithms", "show", "rich", "--json").out)["options"]
    found = {key: (option["type"], option["default"]) for key, option in shown.items()}
    own = ("layers", "inner", "where", "kinds", "mode", "wanted")
    assert {key: found[key] for key in own} == {
        "layers": ("list[int]", [1, 2]), "inner": ("Inner", {"size": 1}), "where": ("Path", "x"),
        "kinds": ("frozenset[str]", ["a"]), "mode": ("same | other | None", None), "wanted": ("float", None),
    }  # fmt: skip
    assert [key for key in own if shown[key]["required"]] == ["wanted"]
    table = command("algorithms", "show", "rich").out
    assert "Undefined" not in table
    assert re.search(r"wanted\W+float\W+required\b", table)
    for fragment in ("[1, 2]", "same | other | None", "list[int]"):
        assert fragment in table


def test_algorithms_show_of_an_unknown_one(command: Command) -> None:
    result = command("algorithms", "show", "jds")
    assert result.code == 2
    assert result.err.startswith("error: algorithm 'jds' is not registered; did you mean 'jsd'?")


def test_tables_are_not_cut_off_in_a_pipe(command: Command, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow the terminal is that the pipe stands in, each entry is whole and on one line."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    plugin("kdflow_squared", SQUARED.replace('"squared"', f'"s{"q" * 60}"')).install(site)
    plugin("kdflow_broken", "import a_module_that_is_not_there").install(site)
    for forced in ({}, {"FORCE_COLOR": "1"}):
        for key, value in forced.items():
            monkeypatch.setenv(key, value)
        listed = re.sub(r"\x1b\[[\d;]*m", "", command("algorithms", "list").out)
        assert "…" not in listed
        (line,) = [line for line in listed.splitlines() if "skew_reverse_kl" in line]
        for fragment in ("divergence", "same_vocabulary, teacher", "kdflow", "https://arxiv.org/abs/2402.03898"):
            assert fragment in line
        (line,) = [line for line in listed.splitlines() if "sqqq" in line]
        assert f"s{'q' * 60} " in line
        plugins = re.sub(r"\x1b\[[\d;]*m", "", command("plugins", "list").out)
        assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in plugins
        assert "…" not in plugins


def test_a_long_error_is_broken_and_not_cut(command: Command, site: Path) -> None:
    word = "x" * 500
    plugin("kdflow_broken", f"raise RuntimeError('{word}')").install(site)
    listed = command("plugins", "list").out
    assert listed.count("x") >= 500
    assert "…" not in listed


def test_colours_only_where_they_are_wanted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert ESCAPE not in command("algorithms", "show", "jsd").out  # a pipe
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert ESCAPE in command("algorithms", "show", "jsd").out


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])(?:;\d+)*m")


def test_no_color_is_heeded(command: Command, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a terminal; bold is no colour: https://no-color.org."""
    plugin("kdflow_broken", "raise SystemExit").install(site)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOUR.search(command("plugins", "list").out)
    monkeypatch.setenv("NO_COLOR", "1")
    listed = command("plugins", "list").out
    assert "failed" in listed
    assert not COLOUR.search(listed)


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_ends_with_a_summary(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    result = command("train", write_run(training={"steps": 2}), "training.steps=1")
    assert result.code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1
    for fragment in (
        "1 steps", f"{summary['tokens']:,} tokens", "divergence from the teacher", "perplexity", "before", "after",
        f"{summary['evaluation']['after']['divergence']:.3f}", f"{summary['evaluation']['before']['perplexity']:,.1f}",
        "the student's text, before training", "the student's text, after step 1", "kdflow export",
    ):  # fmt: skip
        assert fragment in result.out


def test_a_summary_shows_paths_and_texts_as_they_are(command: Command, write_run: WriteRun, tmp_path: Path) -> None:
    """Brackets and colons are no markup."""
    output = tmp_path / "a[lr=1e-3]" / ":smile:[" / "b]"
    result = command("train", write_run(training={"steps": 1}, data={"eval": []}), f"output='{output}'")
    assert (result.code, result.out.count(str(output))) == (0, 4)


def test_ranks_take_no_file_of_the_current_folder_for_a_library(
    command: Command, write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(training={"steps": 1}, data={"eval": []})
    (tmp_path / "datasets.py").write_text("raise SystemExit('this is no library')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kdflow", "train", str(run), "--nproc-per-node", "1"])
    assert command("train", run, "--nproc-per-node", "1").code == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_rank_that_was_launched_launches_no_others(
    command: Command, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    refused = command("train", write_run(), "--nproc-per-node", "2")
    assert refused.code == 2
    assert "--nproc-per-node: RANK is set" in refused.err


def test_a_summary_without_held_out_data_is_no_narrow_table(command: Command, write_run: WriteRun) -> None:
    result = command("train", write_run(training={"steps": 1}, data={"eval": []}))
    assert re.search(r"^samples: \d+ drawn, \d+ trained \(\d+ cut\), 0 dropped$", result.out, re.MULTILINE)
    assert "held out" not in result.out


def test_progress_in_a_pipe_is_plain_lines_on_stderr(command: Command, write_run: WriteRun) -> None:
    result = command("train", write_run(training={"steps": 2}, tracking=["console", "jsonl"]))
    assert "step 2/2" in result.err
    assert ESCAPE not in result.err + result.out
    assert "step 2/2" not in result.out


@pytest.mark.parametrize("arguments", [["--resume", "yes"], ["--nproc-per-node", "0"], ["--steps", "3"]])
def test_a_misused_option_is_refused_before_anything_runs(
    command: Command, write_run: WriteRun, tmp_path: Path, arguments: list[str]
) -> None:
    assert command("train", write_run(), *arguments).code == 2
    assert not (tmp_path / "run").exists()


# --- export ----------------------------------------------------------------------------------------------------------

Trained = Callable[..., Path]


@pytest.fixture
def trained(command: Command, write_run: WriteRun, tmp_path: Path) -> Trained:
    """Trains a tiny student for two steps, each with a checkpoint; gives the run directory."""

    def train(**student: object) -> Path:
        run = write_run(student=student, training={"steps": 2, "checkpoint_every": 1})
        assert command("train", run).code == 0
        return tmp_path / "run"

    return train


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(("which", "keep_layers"), [("student", None), ("untied", None), ("teacher", [0, 2])])
def test_export_loads_with_the_logits_of_the_checkpoint(
    command: Command, trained: Trained, tiny: dict[str, str], tmp_path: Path, which: str, keep_layers: list[int] | None
) -> None:
    run = trained(model=tiny[which], keep_layers=keep_layers)
    with warnings.catch_warnings(record=True) as warned:
        result = command("export", run, "-o", tmp_path / "exported")
    assert (result.code, result.err, [str(warning.message) for warning in warned]) == (0, "", [])
    assert "exported: the student of " in result.out
    assert "step-00000002" in result.out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    assert exported.config.num_hidden_layers == 2

    expected = AutoModelForCausalLM.from_pretrained(tiny[which], dtype=torch.float32, attn_implementation="eager")
    if keep_layers is not None:
        cut_depth(expected, keep_layers)
    untrained = logits(expected)
    tensors = {f"student.model.{name}": parameter.data for name, parameter in expected.named_parameters()}
    load_tensors(run / "checkpoints" / "step-00000002", tensors)
    assert torch.equal(logits(exported), logits(expected))
    assert not torch.equal(logits(exported), untrained)  # it is the trained one
    before, after = (AutoTokenizer.from_pretrained(path) for path in (tiny[which], tmp_path / "exported"))
    assert before("Some text.\n")["input_ids"] == after("Some text.\n")["input_ids"]
    assert before.chat_template == after.chat_template


def test_export_of_an_older_checkpoint_and_in_half_the_size(command: Command, trained: Trained, tmp_path: Path) -> None:
    run = trained()
    older = run / "checkpoints" / "step-00000001"
    assert command("export", run, "-o", tmp_path / "newest").code == 0
    result = command("export", older, "-o", tmp_path / "older", "--dtype", "bfloat16")
    assert f"the student of {older}, in bfloat16" in result.out
    newest = AutoModelForCausalLM.from_pretrained(tmp_path / "newest")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "older", dtype="auto")
    assert half.dtype == torch.bfloat16
    expected = {f"student.model.{name}": torch.empty_like(tensor) for name, tensor in newest.named_parameters()}
    load_tensors(older, expected)
    for name, tensor in half.named_parameters():
        assert torch.equal(tensor, expected[f"student.model.{name}"].bfloat16())
    assert cosine_similarity(logits(half).float(), logits(newest), dim=-1).mean() < 1  # another step


def test_export_of_an_adapter(command: Command, trained: Trained, tiny: dict[str, str], tmp_path: Path) -> None:
    run = trained(model=tiny["student"], lora={"rank": 2})
    with warnings.catch_warnings(record=True) as warned:
        results = [command("export", run, "-o", tmp_path / name, *options)
                   for name, options in (("adapter", ["--adapter"]), ("merged", []))]  # fmt: skip
    assert [(result.code, result.err) for result in results] == [(0, "")] * 2
    assert [str(warning.message) for warning in warned] == []
    assert "adapter: the adapter of " in results[0].out
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_hidden_layers == 2


def test_an_export_is_a_student_again(command: Command, trained: Trained, write_run: WriteRun, tmp_path: Path) -> None:
    """What is exported can be trained on, and by then kdflow knows it as any other model."""
    run = trained()
    assert command("export", run, "-o", tmp_path / "exported").code == 0
    load_model(str(tmp_path / "exported"), torch.float32, torch.device("cpu"))
    again = write_run(
        student={"model": str(tmp_path / "exported")}, training={"steps": 1}, output=str(tmp_path / "again")
    )
    assert command("train", again).code == 0
    first, second = (
        json.loads((tmp_path / name / "summary.json").read_text())["evaluation"] for name in ("run", "again")
    )
    assert second["before"]["divergence"] == pytest.approx(first["after"]["divergence"], rel=1e-6)


def test_an_export_leaves_its_neighbours_alone(command: Command, trained: Trained, tmp_path: Path) -> None:
    run = trained()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "mine.txt").write_text("mine")
    (tmp_path / ".git").write_text("mine too")
    for name in ("cache", "git"):
        before = set(tmp_path.iterdir())
        assert command("export", run, "-o", tmp_path / name).code == 0
        assert (tmp_path / name / "config.json").is_file()
        assert set(tmp_path.iterdir()) - before == {tmp_path / name}
        assert (tmp_path / name).stat().st_mode == run.stat().st_mode
    assert (tmp_path / ".cache" / "mine.txt").read_text() == "mine"
    assert (tmp_path / ".git").read_text() == "mine too"


def test_export_refuses(command: Command, trained: Trained, tmp_path: Path) -> None:
    run = trained()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    result = command("export", run, "-o", tmp_path / "there")
    assert (result.code, result.out) == (2, "")
    assert "there exists; give a directory that does not" in result.err
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]

    result = command("export", tmp_path / "there", "-o", tmp_path / "exported")
    assert result.code == 2
    assert "there holds no whole checkpoint; a run writes them to" in result.err
    result = command("export", tmp_path / "absent", "-o", tmp_path / "exported")
    assert result.code == 2
    assert "absent holds no whole checkpoint" in result.err

    result = command("export", run, "-o", tmp_path / "there" / "mine.txt" / "below")
    assert result.code == 2
    assert "cannot be exported to" in result.err
    assert "Not a directory" in result.err

    checkpoint = run / "checkpoints" / "step-00000001"
    (next(checkpoint.glob("*.distcp"))).write_bytes(b"damaged")
    result = command("export", checkpoint, "-o", tmp_path / "exported")
    assert result.code == 2
    assert "step-00000001 is damaged" in result.err
    assert not (tmp_path / "exported").exists()


def test_a_checkpoint_of_a_version_with_other_keys_says_so(command: Command, trained: Trained, tmp_path: Path) -> None:
    run = trained()
    checkpoint = (run / "checkpoints" / "latest").resolve()
    state = json.loads((checkpoint / RUN_STATE).read_text())
    state["run"]["student"]["dropped"] = 3
    state["run"]["training"]["dropped"] = 3  # of no use to what is asked for
    (checkpoint / RUN_STATE).write_text(json.dumps(state))
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    exported, answers = tmp_path / "exported", tmp_path / "answers.jsonl"
    written = ["generate", run / "run.yaml", "--checkpoint", checkpoint, "--prompts", tmp_path / "p.jsonl"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    for asked in (["export", run, "-o", exported], [*written, "-o", answers]):
        result = command(*asked)
        assert result.code == 2
        assert f"{checkpoint / RUN_STATE}: run.student: dropped: unknown key" in result.err
        assert not exported.exists()
        assert not answers.exists()


def test_the_export_of_a_run_with_a_damaged_newest_checkpoint(
    command: Command, trained: Trained, tmp_path: Path
) -> None:
    run = trained()
    (next((run / "checkpoints" / "step-00000002").glob("*.distcp"))).write_bytes(b"damaged")
    result = command("export", run, "-o", tmp_path / "exported")
    assert result.code == 0
    assert "step-00000001" in result.out


# --- quickstart ------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is no checkout; training is left out."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("kdflow.cli.train.start", lambda *arguments: print("started", *arguments))
    return tmp_path / "work"


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_quickstart_outside_a_checkout_writes_the_examples(command: Command, elsewhere: Path) -> None:
    result = command("quickstart")
    assert result.code == 0
    assert result.out.splitlines() == [
        "wrote examples/quickstart.yaml and its data: edit it and run 'kdflow train examples/quickstart.yaml'",
        "started examples/quickstart.yaml [] True ()",
    ]
    assert files(elsewhere) >= {
        f"examples/{name}" for name in ("quickstart.yaml", "data/train.jsonl", "data/eval.jsonl")
    }
    # Paths in it are true where it was written, and it is an ordinary run file.
    run_file = kdflow.config.load("examples/quickstart.yaml")
    config = run_file.resolve(kdflow.plugins.load())
    assert config.output == "runs/quickstart"
    for source in (*config.data.train, *config.data.eval):
        assert Path(source.path).is_file()


def test_quickstart_leaves_what_is_there_as_it_is(command: Command, elsewhere: Path) -> None:
    (elsewhere / "examples" / "data").mkdir(parents=True)
    (elsewhere / "examples" / "data" / "train.jsonl").write_text("mine")
    quickstart._write_examples()
    assert (elsewhere / "examples" / "data" / "train.jsonl").read_text() == "mine"
    (elsewhere / "examples" / "quickstart.yaml").write_text("edited")
    assert command("quickstart", "-p", "no:jsd").out == "started examples/quickstart.yaml [] True ('jsd',)\n"
    assert (elsewhere / "examples" / "quickstart.yaml").read_text() == "edited"


def test_quickstart_where_the_examples_cannot_be_written(command: Command, elsewhere: Path) -> None:
    (elsewhere / "examples").write_text("mine")
    result = command("quickstart")
    assert (result.code, result.out) == (2, "")
    assert re.match(
        r"error: examples/\S+ cannot be written: \w.+; run kdflow quickstart in another folder$", result.err
    )
    assert (elsewhere / "examples").read_text() == "mine"


# --- as a shell sees it ----------------------------------------------------------------------------------------------


def test_the_installed_script_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("kdflow")
    done = subprocess.run([script, "--version"], text=True, capture_output=True, check=True)
    assert done.stdout == kdflow_process("--version").out


@pytest.mark.parametrize("model", ["models/student", "./models/student"])
def test_a_model_that_a_run_named_by_a_relative_path_is_told_as_such(
    command: Command,
    write_run: WriteRun,
    tiny: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "student").symlink_to(tiny["student"])
    (tmp_path / "elsewhere").mkdir()
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "a", "answer": "b"}])
    evaluation = [{"name": "exact_match", "path": asked, "max_new_tokens": 2}]
    run = write_run(student={"model": model}, training={"steps": 1}, evaluation=evaluation)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert command("train", run).code == 0
    commands = [
        ["export", tmp_path / "run", "-o", tmp_path / "exported"],
        ["evaluate", run, "--json"],
        ["generate", run, "--checkpoint", tmp_path / "run", "--prompts", asked, "-o", tmp_path / "out.jsonl",
         "--max-new-tokens", 2],
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path / "elsewhere")
    for arguments in commands:
        result = command(*arguments)
        assert result.code == 2
        *_, last = result.err.splitlines()
        assert last == (
            f"{tmp_path / 'run' / 'checkpoints' / 'step-00000001'} names this model as its run did. If it is a path "
            "relative to the folder where the run began, start kdflow there"
        )
    monkeypatch.chdir(tmp_path)
    assert [command(*arguments).code for arguments in commands] == [0, 0, 0]
