"""Evaluators on real models: a checkpoint's student, and any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import kdflow
from kdflow.contracts import KdflowError, SampleError
from kdflow.runtime.evaluate import evaluate, figure
from kdflow.runtime.export import export
from tests.support.commands import Command, command, site
from tests.support.distributions import plugin
from tests.support.models import make_model, make_tokenizer, write_jsonl

__all__ = ["command", "site"]

RunFile = Callable[..., dict[str, Any]]
WORDS = ["red", "green", "blue", "white"]


@pytest.fixture
def run(run_file: RunFile, tmp_path: Path) -> dict[str, Any]:
    """A run that learns four answers by heart, and asks for them."""
    records = [{"prompt": f"Colour {n}? ", "response": word} for n, word in enumerate(WORDS)]
    asked = [{"prompt": r["prompt"], "answer": r["response"], "choices": WORDS} for r in records]
    source = {"path": write_jsonl(tmp_path / "train.jsonl", records), "format": "prompt_response"}
    questions = write_jsonl(tmp_path / "asked.jsonl", asked)
    evaluation = [
        {"name": "exact_match", "path": questions, "max_new_tokens": 8},
        {"name": "multiple_choice", "path": questions},
    ]
    return run_file(
        algorithm={"name": "sft"}, data={"train": [source], "eval": []}, evaluation=evaluation,
        training={"steps": 60, "tokens_per_step": 60, "learning_rate": 1e-2},
    )  # fmt: skip


def figures(found: dict[str, Any]) -> dict[str, Any]:
    return {f"{result['name']}.{name}": told for result in found["results"] for name, told in result["figures"].items()}


def test_what_was_learnt_by_heart_is_answered(run: dict[str, Any], tiny: dict[str, str]) -> None:
    before = figures(evaluate(run, model=tiny["student"]))
    assert before["exact_match.accuracy"]["value"] < 0.5
    kdflow.train(run)
    found = evaluate(run)
    assert found["model"].endswith("step-00000060")
    after = figures(found)
    for name in ("exact_match.accuracy", "multiple_choice.accuracy"):
        assert (after[name]["sum"], after[name]["count"]) == (4, 4)
        assert after[name]["interval"] == pytest.approx([0.5101, 1.0], abs=1e-4)


def test_choices_are_scored_as_transformers_would(run: dict[str, Any], tmp_path: Path) -> None:
    kdflow.train(run, ["training.steps=6"])
    export(Path(run["output"]), tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    right = {"accuracy": 0, "accuracy_per_byte": 0}
    for number, word in enumerate(WORDS):
        prompt = tokenizer(f"Colour {number}? ", add_special_tokens=False).input_ids
        scores = []
        for choice in WORDS:
            ids = tokenizer(choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
            scores.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()))
        right["accuracy"] += WORDS[scores.index(max(scores))] == word
        per_byte = [score / len(choice) for score, choice in zip(scores, WORDS, strict=True)]
        right["accuracy_per_byte"] += WORDS[per_byte.index(max(per_byte))] == word
    found = figures(evaluate(run))
    assert {name: found[f"multiple_choice.{name}"]["sum"] for name in right} == right


def test_log_likelihoods_do_not_depend_on_packing(run: dict[str, Any], tiny: dict[str, str]) -> None:
    from kdflow.contracts import EngineContext, Sample
    from kdflow.runtime.evaluate import _Subject

    samples = [Sample(prompt=f"Colour {n}? ", response=word) for n in range(5) for word in WORDS]
    context = EngineContext(torch.device("cpu"), torch.float32)
    wide, narrow = (_Subject(tiny["teacher"], context, tokens).log_likelihoods(samples) for tokens in (512, 1))
    assert wide == pytest.approx(narrow, rel=1e-5)
    with pytest.raises(SampleError, match="sample 2: no token of the response is left to score"):
        _Subject(tiny["teacher"], context, 512).log_likelihoods([samples[0], Sample(prompt="Nothing? ")])


def test_a_prompt_without_tokens_is_refused(tiny: dict[str, str]) -> None:
    from kdflow.contracts import EngineContext, Sample
    from kdflow.runtime.evaluate import _Subject

    subject = _Subject(tiny["teacher"], EngineContext(torch.device("cpu"), torch.float32), 512)
    with pytest.raises(KdflowError, match="prompt 1 has no tokens"):
        subject.respond([Sample(prompt="Who?"), Sample(prompt="")], 2)


def test_the_command(command: Command, run: dict[str, Any], tmp_path: Path, tiny: dict[str, str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    missing = command("evaluate", file)
    assert missing.code == 2
    assert "holds no whole checkpoint" in missing.err
    both = command("evaluate", file, "--model", tiny["student"], "--checkpoint", run["output"])
    assert (both.code, both.err) == (2, "error: --checkpoint and --model each name what is asked; give one of them\n")
    shown = command("evaluate", file, "--model", tiny["student"])
    assert shown.code == 0
    for text in (tiny["student"], "exact_match", "multiple_choice", "accuracy_per_byte", "95 % interval"):
        assert text in shown.out
    kdflow.train(run, ["training.steps=2"])
    found = json.loads(command("evaluate", file, "--json", "--checkpoint", run["output"]).out)
    assert [result["name"] for result in found["results"]] == ["exact_match", "multiple_choice"]


@pytest.mark.parametrize(("evaluation", "message"), [
    ([], "the run file has no evaluators; add evaluation: "),
    ([{"name": "exact_match"}], r"evaluation\.0\.path: this key is needed"),
    ([{"name": "exact_mach", "path": "x"}], r"evaluation\.0\.name: evaluator 'exact_mach' .* did you mean 'exact_"),
    ([{"name": "exact_match", "path": "x", "shot": 3}], r"evaluation\.0\.shot: unknown key; did you mean 'shots'\?"),
    ([{"name": "exact_match", "path": "absent.jsonl"}], r"absent.jsonl: there is no such data file"),
])  # fmt: skip
def test_evaluations_at_fault(run: dict[str, Any], tiny: dict[str, str], evaluation: Any, message: str) -> None:
    with pytest.raises(KdflowError, match=message):
        evaluate({**run, "evaluation": evaluation}, model=tiny["student"])


def test_a_record_at_fault_is_told_with_its_file(run: dict[str, Any], tiny: dict[str, str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "a"}])
    with pytest.raises(KdflowError, match=rf"^{path}: record 2: the field 'answer' is missing.*'exact_match'"):
        evaluate({**run, "evaluation": [{"name": "exact_match", "path": path}]}, model=tiny["student"])


def test_a_field_that_a_plugins_evaluator_does_not_find_is_told(
    site: Path, run: dict[str, Any], tmp_path: Path
) -> None:
    plugin("kdflow_odd", FIGURES.replace("{figure}", "(sum(len(r['prompt']) for r in records), 2)")).install(site)
    path = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "a"}, {"text": "a", "answer": "b"}])
    told = f"{path}: record 2: the field 'prompt' is missing; the record has answer, text (evaluator 'odd')"
    with pytest.raises(KdflowError, match=f"^{re.escape(told)}$"):
        evaluate({**run, "evaluation": [{"name": "odd", "path": path}]}, model=run["student"]["model"])


@pytest.mark.parametrize("family", ["learnt", "rotary"])
@pytest.mark.parametrize(("name", "record", "message"), [
    ("exact_match", {"prompt": "Q" * 600}, r"record 3: the prompt's \d+ tokens and 16 new ones are more than the 512 "),
    ("multiple_choice", {"prompt": "?", "choices": ["a", "b" * 600]},
     r"record 3: 'choices', number 2: the \d+ tokens of prompt and response are more than the 512 "),
])  # fmt: skip
def test_a_record_without_room_in_the_models_positions_is_named(
    run: dict[str, Any], tiny: dict[str, str], tmp_path: Path, family: str, name: str, record: Any, message: str
) -> None:
    """Where positions are learnt there are no more; rotary ones go on, to what was never trained."""
    model = tiny["student"]
    if family == "learnt":
        tokenizer, model = AutoTokenizer.from_pretrained(model), str(tmp_path / "gpt2")
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=1, n_head=4,
                            bos_token_id=0, eos_token_id=2)  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    fits = {"prompt": "Emma", "answer": 0, "choices": ["a", "b"]}
    path = write_jsonl(tmp_path / "long.jsonl", [fits, fits, {"answer": 0, **record}])
    options = {"shots": 1, "max_new_tokens": 16} if name == "exact_match" else {}
    with pytest.raises(KdflowError, match=rf"^{path}: {message}.* \(evaluator '{name}'\)$"):
        evaluate({**run, "evaluation": [{"name": name, "path": path, **options}]}, model=model)
    fitting = write_jsonl(tmp_path / "short.jsonl", [fits, fits])
    evaluate({**run, "evaluation": [{"name": name, "path": fitting, **options}]}, model=model)


def test_a_choice_of_which_no_token_is_scored_is_named(run: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    model = make_model(tmp_path / "drops", tokenizer=tokenizer)
    records = [{"prompt": "?", "choices": choices, "answer": 0} for choices in (["yes", "no"], ["yes", "no", "~"])]
    path = write_jsonl(tmp_path / "items.jsonl", records)
    with pytest.raises(KdflowError, match=rf"^{path}: record 2: 'choices', number 3: no token of the response is left"):
        evaluate({**run, "evaluation": [{"name": "multiple_choice", "path": path}]}, model=model)


FIGURES = """
import kdflow
import numpy as np

class Odd(kdflow.Evaluator):
    name = "odd"
    def evaluate(self, records, model):
        return {"hard": {figure}}

@kdflow.hookimpl
def kdflow_evaluators():
    return [Odd]
"""


def test_a_figure_of_nothing_has_no_value(command: Command, site: Path, run: dict[str, Any], tmp_path: Path) -> None:
    plugin("kdflow_odd", FIGURES.replace("{figure}", "(np.int64(0), np.int64(0))")).install(site)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**run, "evaluation": [{**run["evaluation"][1], "name": "odd"}]}))
    shown = command("evaluate", file, "--model", run["student"]["model"], "--json")
    assert json.loads(shown.out)["results"][0]["figures"] == {"hard": {"value": None, "sum": 0, "count": 0}}
    table = command("evaluate", file, "--model", run["student"]["model"]).out
    assert re.search(r"hard\W+-\W+-\W+0\W", table), table


@pytest.mark.parametrize("found", ["0.5", "(1, 2, 3)", "('much', 2)", "(1, -1)", "(float('nan'), 2)"])
def test_a_figure_that_is_no_pair_is_told(site: Path, run: dict[str, Any], found: str) -> None:
    plugin("kdflow_odd", FIGURES.replace("{figure}", found)).install(site)
    shown = found.replace("float('nan')", "nan")
    told = f"evaluator 'odd': its figure 'hard' must be a finite sum and a count, not {shown}"
    with pytest.raises(KdflowError, match=re.escape(told)):
        evaluate({**run, "evaluation": [{**run["evaluation"][1], "name": "odd"}]}, model=run["student"]["model"])


@pytest.mark.parametrize(("result", "told"), [
    ("None", "evaluator 'odd': evaluate must return its figures by name, such as {'accuracy': (3, 4)}, a sum and a "
             "count, not None"),
    ("[('hard', (1, 2))]", "evaluator 'odd': evaluate must return its figures by name"),
    ("{1: (1, 2)}", "evaluator 'odd': a figure's name must be text, not 1"),
    ("{'hard': (records[0]['prompt'] + 1, 2)}", "the evaluator failed: TypeError: can only concatenate str"),
    ("{'hard': {}['soft']}", "the evaluator failed: KeyError: 'soft' (evaluator 'odd')"),
])  # fmt: skip
def test_an_evaluator_at_fault_is_named(
    site: Path, run: dict[str, Any], tmp_path: Path, result: str, told: str
) -> None:
    plugin("kdflow_odd", FIGURES.replace('{"hard": {figure}}', result)).install(site)
    path = write_jsonl(tmp_path / "odd.jsonl", [{"prompt": "a", "soft": 1}])
    with pytest.raises(KdflowError, match=re.escape(told)):
        evaluate({**run, "evaluation": [{"name": "odd", "path": path}]}, model=run["student"]["model"])


def test_intervals_are_wilsons() -> None:
    # Agresti and Coull (1998) give 0 of 10 as (0, 0.278).
    assert figure(0, 10)["interval"] == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert figure(93, 200)["interval"] == pytest.approx([0.3972, 0.5342], abs=1e-4)
    assert "interval" not in figure(2.5, 10)
