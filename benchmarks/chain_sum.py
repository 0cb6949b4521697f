"""Which way of distilling helps on a real task: sums of two or three numbers, answered exactly.

The teacher is SmolLM2-135M-Instruct, tuned by ``sft`` on 4,000 sums; the student is every third of its layers. Each
method trains the student on the same sums for the same tokens; accuracy is over the 200 held-out sums, answered
greedily, and divergence is from the teacher, on the right answers. ``sequence`` is ``sft`` on the teacher's answers; on
``…_on_policy`` the student answers every sum itself, in ``gkd`` every second one.

    python benchmarks/chain_sum.py OUT [--methods sft,jsd] [--seeds 3] [--epochs 1]
    python benchmarks/chain_sum.py OUT --after sft --methods sft,jsd,gkd    # with that method's students

Goes on where it was stopped; raw results are kept in OUT/results.json, and the table is printed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import kdflow
from kdflow.contracts import Sampling
from kdflow.runtime.evaluate import evaluate, figure
from kdflow.runtime.export import export
from kdflow.runtime.generate import generate

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "State the final answer to the following arithmetic problem: {} ="
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"name": "sft"},
    "forward_kl": {"name": "forward_kl"},
    "reverse_kl": {"name": "reverse_kl"},
    "jsd": {"name": "jsd", "beta": 0.5},
    "skew_kl": {"name": "skew_kl", "skew": 0.1},
    "sequence": {"name": "sft"},
    "gkd": {"name": "gkd", "beta": 0.5},
    "reverse_kl_on_policy": {"name": "reverse_kl"},
}
# Fractions of the samples that the student answers itself.
ON_POLICY = {"gkd": 0.5, "reverse_kl_on_policy": 1.0}


def sums(seed: int, count: int, taken: set[str]) -> list[dict[str, Any]]:
    """Sums of 2 or 3 terms of 1 or 2 digits, none of them twice."""
    generator, found = random.Random(seed), list[dict[str, Any]]()
    while len(found) < count:
        digits = generator.choice((1, 2))
        terms = [
            generator.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
            for _ in range(generator.choice((2, 3)))
        ]
        signs = [generator.choice("+-") for _ in terms[1:]]
        text = " ".join([str(terms[0]), *(f"{sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))])
        if text in taken:
            continue
        taken.add(text)
        answer = str(sum(terms[:1]) + sum(int(f"{sign}{term}") for sign, term in zip(signs, terms[1:], strict=True)))
        turns = [{"role": "user", "content": QUESTION.format(text)}, {"role": "assistant", "content": answer}]
        found.append({"messages": turns, "answer": answer})
    return found


def write_data(out: Path, train: int, held_out: int) -> None:
    """Held-out sums first, so that none of them is among those trained on."""
    taken: set[str] = set()
    for name, seed, count in (("eval", 1, held_out), ("train", 2, train)):
        lines = [json.dumps(record) + "\n" for record in sums(seed, count, taken)]
        (out / f"{name}.jsonl").write_text("".join(lines))


def run_file(
    out: Path, name: str, algorithm: dict[str, Any], arguments: argparse.Namespace, **sections: Any
) -> dict[str, Any]:
    """A run over the sums; everything but student, teacher and data is the same for all."""
    train, rate = sections.pop("train", out / "train.jsonl"), sections.pop("rate", 1e-4)
    return {
        "student": {"model": BASE},
        "algorithm": algorithm,
        "data": {
            "train": [{"path": str(train), "format": "chat"}],
            "eval": [{"path": str(out / "eval.jsonl"), "format": "chat"}],
            "max_length": 128,
            "max_tokens": 2048,
        },
        "training": {
            "epochs": arguments.epochs,
            "tokens_per_step": 2048,
            "learning_rate": rate,
            "schedule": "linear",
            "warmup": 0.05,
            "evaluate_every": None,
            "checkpoint_every": None,
            "keep_checkpoints": 1,
        },
        "evaluation": [{"name": "exact_match", "path": str(out / "eval.jsonl"), "max_new_tokens": 8}],
        "tracking": ["console", "jsonl"],
        "output": str(out / "runs" / name),
        **sections,
    }


def trained(run: dict[str, Any], out: Path) -> Path:
    """The exported student of a run, trained unless it is there."""
    model = out / "models" / Path(run["output"]).name
    if not model.exists():
        kdflow.train(run, resume="auto")
        model.parent.mkdir(exist_ok=True)
        export(Path(run["output"]), model)
    return model


def main() -> None:
    """Train the teacher, then each method with each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default="sft,forward_kl,reverse_kl,jsd,skew_kl,sequence")
    parser.add_argument("--after", choices=METHODS, help="begin with the students that this method has made")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=5e-4, help="the students' learning rate; the teacher's is 1e-4")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, arguments.train, 200)
    results = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}

    def record(name: str, model: Path, output: str) -> None:
        if name not in results:
            (asked,) = evaluate(run_file(out, name, {"name": "sft"}, arguments), model=str(model))["results"]
            summary = json.loads((Path(output) / "summary.json").read_text())
            after = summary["evaluation"]["after"]
            results[name] = {
                **{key: asked["figures"]["accuracy"][key] for key in ("sum", "count")},
                "divergence": after["divergence"],
                **{key: summary[key] for key in ("seconds", "steps", "tokens")},
            }
            (out / "results.json").write_text(json.dumps(results, indent=1))

    teacher_run = run_file(out, "teacher", {"name": "sft"}, arguments)
    teacher = trained(teacher_run, out)
    record("teacher", teacher, teacher_run["output"])
    responses = out / "responses.jsonl"
    if "sequence" in arguments.methods:
        generate(
            {**teacher_run, "teacher": {"model": str(teacher)}},
            out / "train.jsonl",
            responses,
            Sampling(max_new_tokens=8, temperature=0.0),
        )
    prefix = f"{arguments.after}-then-" if arguments.after else ""
    for seed in range(arguments.seeds):
        for method in arguments.methods.split(","):
            sections: dict[str, Any] = {"train": responses} if method == "sequence" else {}
            if method in ON_POLICY:
                sections["rollout"] = {"fraction": ON_POLICY[method], "max_new_tokens": 8}
            begun = out / "models" / f"{arguments.after}-{seed}"
            run = run_file(
                out,
                f"{prefix}{method}-{seed}",
                METHODS[method],
                arguments,
                seed=seed,
                student={"model": str(begun)} if arguments.after else {"model": BASE, "keep_layers": "::3"},
                teacher={"model": str(teacher)},
                rate=arguments.rate,
                **sections,
            )
            record(f"{prefix}{method}-{seed}", trained(run, out), run["output"])
    rows = [f"{prefix}{method}" for method in arguments.methods.split(",")]
    print_table(results, [arguments.after, *rows] if arguments.after else rows, arguments.seeds)


def print_table(results: dict[str, Any], methods: list[str], seeds: int) -> None:
    """Accuracy pooled over seeds, each seed's, and the mean divergence."""
    print("| method | right | 95 % interval | each seed | divergence from the teacher (nats) | seconds a run |")
    print("| --- | ---: | --- | --- | ---: | ---: |")
    for method in ["teacher", *methods]:
        found = [results["teacher"]] if method == "teacher" else [results[f"{method}-{seed}"] for seed in range(seeds)]
        right, count = (sum(result[key] for result in found) for key in ("sum", "count"))
        low, high = figure(right, count)["interval"]
        each = " ".join(str(result["sum"]) for result in found)
        gaps = [result["divergence"] for result in found if result["divergence"] is not None]
        gap = f"{sum(gaps) / len(gaps):.3f}" if gaps else "-"
        seconds = sum(result["seconds"] for result in found) / len(found)
        print(f"| {method} | {right / count:.1%} | {low:.1%} to {high:.1%} | {each} | {gap} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
