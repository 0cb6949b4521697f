"""``kdflow check``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from kdflow.cli import app
from kdflow.cli.console import stdout, table
from kdflow.cli.options import Json, Overrides
from kdflow.imports import large_imports

_SHOWN = 1200  # characters of a sample
_MEMORY = {
    "parameters": "parameters, and those that it computes with",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations of a micro-batch",
    "head": "a chunk of logits, rows, the head's gradient",
    "teacher": "teacher",
    "teacher_rows": "the teacher's rows",
    "following_weights": "weights of the teacher that follows",
    "rollout_engine": "the student's copy that writes",
    "total": "total",
}


@app.command()
def check(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file.")],
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that the run will have.")] = 1,
    as_json: Json = False,
) -> None:
    """Show what a run will do and need, without loading a weight; exits with 2 if it cannot start."""
    with large_imports():
        from kdflow.runtime.check import check as check_run

    found = check_run(run, overrides or [], ctx.obj, devices)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(stdout(), found)
    if found["problems"]:
        raise typer.Exit(2)


def _show(console: Console, found: dict[str, Any]) -> None:
    """One page."""
    run = found["run"]
    options = ", ".join(f"{key}={value}" for key, value in run["algorithm"].items() if key != "name")
    console.print(f"[bold]{run['algorithm']['name']}[/] {escape(options)}")
    console.print(escape(", ".join(f"{name} {version}" for name, version in found["environment"]["versions"].items())))
    plugins = [plugin for plugin in found["environment"]["plugins"] if plugin["distribution"] != "kdflow"]
    others = ", ".join(f"{plugin['distribution']} {plugin['version']} ({plugin['status']})" for plugin in plugins)
    console.print(f"plugins of other packages: {escape(others) or 'none'}\n")
    for show in (_options, _models, _data, _sample, _batches, _memory):
        show(console, found)
    for problem in found["problems"]:
        console.print(f"[red]problem[/]: {escape(problem)}", soft_wrap=True)
    if not found["problems"]:
        console.print("[green]nothing stands in the way of this run[/]")


def _options(console: Console, found: dict[str, Any]) -> None:
    """The run file with every default written out, a section a row, as it could stand in the file."""
    from kdflow.config.yaml_file import flow

    rows = table("section", "what the run file comes to")
    for section, value in found["run"].items():
        if section == "data":
            sources = {f"{section}.{part}": value[part] for part in ("train", "eval")}
            rest = {key: other for key, other in value.items() if key not in ("train", "eval")}
            rows.add_row(section, escape(flow(rest)))
            for part, listed in sources.items():
                rows.add_row(part, escape("\n".join(map(flow, listed)) or "[]"))
        else:
            rows.add_row(section, escape(flow(value)))
    console.print(rows)


def _models(console: Console, found: dict[str, Any]) -> None:
    rows = table("", "student", "teacher")
    models, tokenizers = found.get("models", {}), found.get("tokenizers", {})
    if not models and not tokenizers:
        return

    def row(name: str, values: dict[str, Any], form: str, key: str) -> None:
        cells = [form.format(values[side][key]) if side in values else "-" for side in ("student", "teacher")]
        rows.add_row(name, *map(escape, cells))

    if models:
        row("architecture", models, "{}", "architecture")
        row("parameters", models, "{:,}", "parameters")
        rows.add_row("trained", f"{models['student']['trained']:,}", "-")
        row("layers", models, "{}", "layers")
        row("hidden size", models, "{}", "hidden_size")
        row("rows of the head", models, "{:,}", "vocab_size")
    if tokenizers:
        row("vocabulary", tokenizers, "{:,}", "vocabulary")
        told = {side: {"begin": " ".join(one["begins_texts_with"]) or "nothing",
                       "end": one["ends_responses_with"] or "nothing",
                       "template": "yes" if one["chat_template"] else "none"}
                for side, one in tokenizers.items() if side != "vocabulary"}  # fmt: skip
        row("texts begin with", told, "{}", "begin")
        row("responses end with", told, "{}", "end")
        row("chat template", told, "{}", "template")
    console.print(rows)
    if "vocabulary" in tokenizers:
        shared = tokenizers["vocabulary"]
        same = "the vocabularies are the same" + (f", but {shared['renaming']}" if shared["renaming"] else "")
        overlap = (
            f"{shared['difference']}. The vocabularies share {shared['shared_tokens']:,} tokens, by what they spell: "
            f"{shared['shared_tokens'] / shared['student_size']:.1%} of the student's, "
            f"{shared['shared_tokens'] / shared['teacher_size']:.1%} of the teacher's"
        )
        console.print(f"{escape(same if shared['same'] else overlap)}\n", soft_wrap=True)


def _data(console: Console, found: dict[str, Any]) -> None:
    if "data" not in found:
        return
    rows = table("data", "records", "of those looked at", "tokens: least, median, 90 %, 99 %, most", "learnt: median")
    for part, sources in found["data"].items():
        for source in sources:
            count = "a stream" if source["records"] is None else f"{source['records']:,}"
            fate = ", ".join(f"{source[what]} {what}" for what in ("truncated", "dropped", "unusable") if source[what])
            lengths = " ".join(f"{value:,}" for value in source["tokens"].values())
            looked = f"{source['looked_at']}: {fate or 'all fit'}"
            rows.add_row(
                escape(f"{part} {source['path']}"), count, looked, lengths, str(source["targets"].get("p50", ""))
            )
    console.print(rows)
    for source in found["data"]["train"]:
        if aligned := source["aligned"]:
            text = (
                f"{source['path']}: {aligned['one_to_one']:.1%} of the learnt tokens are aligned one-to-one with the "
                f"teacher's, {aligned['spanning']:.1%} in longer spans, {aligned['unmatched']:.1%} not at all"
            )
            console.print(f"{escape(text)}\n", soft_wrap=True)


def _sample(console: Console, found: dict[str, Any]) -> None:
    sample = found.get("sample") or {}
    for side in ("student", "teacher"):
        if side in sample:
            mark = ("[bold green]", "[/]") if console.is_terminal and not console.no_color else ("⟦", "⟧")
            shown, left = "", _SHOWN
            for stretch in sample[side]:
                text = stretch["text"] if len(stretch["text"]) <= left else f"{stretch['text'][: max(left, 0)]} …"
                shown += f"{mark[0]}{escape(text)}{mark[1]}" if stretch["learnt"] else escape(text)
                left -= len(text)
                if left <= 0:
                    break
            title = escape(f"{sample['id']} as the {side} sees it; what is learnt is marked")
            console.print(Panel(shown, title=title, title_align="left"))


def _batches(console: Console, found: dict[str, Any]) -> None:
    batches = found.get("batches")
    if not batches:
        return
    run, devices = found["run"], found["memory"]["devices"] if "memory" in found else 1
    micro, budget = batches["micro_batches_per_step_and_device"], run["data"]["max_tokens"]
    text = (
        f"a step: at least {run['training']['tokens_per_step']:,} tokens, "
        f"about {batches['samples_per_step']:,.1f} samples and {batches['target_tokens_per_step']:,.0f} learnt tokens, "
        f"in about {micro} micro-batches of at most {budget:,} tokens"
        f"{f' on each of {devices} devices' if devices > 1 else ''}"
    )
    if "steps" in batches:
        text += (
            f"\nan epoch: about {batches['steps_per_epoch']:,.1f} steps; the run: {batches['steps']:,} steps, "
            f"{batches['epochs']:.2f} epochs"
        )
    if (rollout := run["rollout"]) and rollout["fraction"]:
        text += (
            f"\nthe student answers {rollout['fraction']:.0%} of the samples itself, in at most "
            f"{rollout['max_new_tokens']} tokens (engine {rollout['engine']['name']})"
        )
    if found.get("flops_per_step"):
        text += f"\nabout {found['flops_per_step']:.3g} floating-point operations a step"
    console.print(text + "\n", soft_wrap=True)


def _memory(console: Console, found: dict[str, Any]) -> None:
    if "memory" not in found:
        return
    memory = found["memory"]
    rows = table(f"memory on each device, estimated: fullest {memory['fullest']}", "GiB")
    for key, label in _MEMORY.items():
        if key in memory["bytes"]:
            value = memory["bytes"][key]
            rows.add_row(label, "not known" if value is None else f"{value / 2**30:.2f}")
    rows.add_row("there is", f"{memory['capacity'] / 2**30:.2f}")
    rows.add_row("checkpoints on disk", f"{memory['checkpoints_on_disk'] / 2**30:.2f}")
    console.print(rows)
    if memory["asleep"]:
        console.print(f"asleep while the student learns: {' and '.join(memory['asleep'])}")
