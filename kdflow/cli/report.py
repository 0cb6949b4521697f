"""``kdflow report``: one page of a run, which needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from kdflow.cli import app
from kdflow.cli.curves import curves
from kdflow.cli.summary import evaluation_rows
from kdflow.contracts import KdflowError

Event = Mapping[str, Any]

# Numbers of a step that have a curve of their own, or none: the rest are the algorithm's metrics.
_NO_METRICS = {
    "step", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "memory_bytes", "flops_utilisation",
    "flops_per_second", "target_tokens", "epoch", "engine_restarts",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --faint: #8884; --quiet: #777 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e8; --paper: #17171a; --quiet: #999 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1120px;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse } th, td { padding: .2rem .9rem .2rem 0; text-align: right; vertical-align: top }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left }
tr + tr td { border-top: 1px solid var(--faint) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
.grid { stroke: var(--faint) } .line { fill: none; stroke: currentColor; stroke-width: 1.6 }
svg text { font-size: 11px; fill: var(--quiet) } .value { text-anchor: end } .step { text-anchor: middle }
.legend span { margin-right: 1rem; font-size: .85rem } .legend span::before { content: "— " }
.c0 { color: #2f6fdb } .c1 { color: #d9722b } .c2 { color: #2b9a66 } .c3 { color: #b5489b } .c4 { color: #8a7a00 }
.c5 { color: #c63a3a } pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--faint); white-space: pre-wrap }
.prompt { color: var(--quiet) } li { margin: .2rem 0 }
"""


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, also of a run that is not over.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write. [RUN/report.html]", show_default=False)
    ] = None,
) -> None:
    """Write one self-contained HTML page of a run: curves, figures before and after, times, warnings, options."""
    from kdflow.runtime.run_directory import read_events, write_atomically

    metrics, written = run / "metrics.jsonl", output or run / "report.html"
    summary = run / "summary.json"
    try:
        if not metrics.is_file():
            raise KdflowError(
                f"{run} holds no metrics.jsonl; give the output directory of a run, whose tracking has 'jsonl'"
            )
        texts = {name: _text(run / name) for name in ("run.yaml", "environment.json")}
        told = _summary(summary) if summary.is_file() else None
        events = list(read_events(metrics))
    except OSError as error:
        raise KdflowError(f"{run} cannot be read: {error.strerror}; give the output directory of a run") from None
    try:
        text = page(run.resolve().name, events, told, texts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # what a run writes was changed
        why = f"lacks {error}" if isinstance(error, KeyError) else f"is at fault: {error}"
        raise KdflowError(f"{run}: metrics.jsonl or summary.json {why}; put back what the run wrote") from None
    try:
        if written.is_dir():
            raise KdflowError(f"{written} is a directory; give a file for -o, such as {written / 'report.html'}")
        write_atomically(written, text)
    except OSError as error:
        raise KdflowError(f"{written} cannot be written: {error.strerror}; give another -o") from None
    print(written)


def page(name: str, events: Sequence[Event], summary: Event | None, texts: Mapping[str, str]) -> str:
    """The page.

    Args:
        name: of the run.
        events: of its ``metrics.jsonl``.
        summary: the run's last word; None while it is not over.
        texts: files that are shown whole, by name.
    """
    steps, evals = _of(events, "step"), _of(events, "eval")
    parts = [
        f"<h1>{escape(name)}</h1>", _overview(steps, summary), *_before_and_after(evals),
        f'<h2>Training</h2><div class="figures">{"".join(_training(steps))}</div>' if len(steps) > 1 else "",
        *_held_out(evals), *_time(steps), *_samples(_of(events, "sample")), *_warnings(events), *_skipped(summary),
        *(f"<details><summary>{file}</summary>{_pre(text)}</details>" for file, text in texts.items()),
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><title>{escape(name)} · kdflow</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _of(events: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _text(file: Path) -> str:
    if not file.is_file():
        return "not there"
    content = file.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise KdflowError(f"{file}:{line}: this is no UTF-8: {error.reason}; mend it, or move the file away") from None


def _summary(file: Path) -> Event:
    try:
        found = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise KdflowError(f"{file}:{error.lineno}: this is no JSON: {error.msg}; mend it, or move it away") from None
    if not isinstance(found, dict):
        raise KdflowError(f"{file} is no summary of a run, which is a mapping; move it away")
    return found


def _pre(text: str, prompt: str = "") -> str:
    return f'<pre><span class="prompt">{escape(prompt)}</span>{escape(text)}</pre>'


def _when(step: int) -> str:
    return "before training" if step == 0 else f"after step {step}"


def _table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    titles = f"<tr>{''.join(f'<th>{escape(title)}</th>' for title in head)}</tr>" if head else ""
    body = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{titles}{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def _overview(steps: Sequence[Event], summary: Event | None) -> str:
    tokens, seconds = (sum(step[key] for step in steps) for key in ("tokens", "seconds"))
    rows = [
        ("steps", f"{steps[-1]['step'] if steps else 0:,}" + ("" if summary else ", and not over")),
        ("tokens", f"{tokens:,}"),
        ("tokens a second", f"{tokens / seconds:,.0f}" if seconds else "-"),
        ("seconds in steps", f"{seconds:,.1f}"),
    ]
    if summary:
        samples = summary["samples"]
        rows += [
            ("seconds in all", f"{summary['wall_seconds']:,.1f}"),
            ("peak memory, GiB", f"{summary['peak_memory_bytes'] / 2**30:.2f}"),
            ("processes", str(summary["world_size"])),
            ("samples", f"{samples['drawn']:,} drawn, {samples['trained']:,} trained, {samples['truncated']:,} cut"),
        ]
    return _table(rows)


def _before_and_after(evals: Sequence[Event]) -> list[str]:
    if not evals:
        return []
    found = {_when(one["step"]): one for one in (evals[0], evals[-1])}
    return ["<h2>Held out</h2>", _table(evaluation_rows(found), ("", *found))]


def _curve(title: str, events: Sequence[Event], key: str, scale: float = 1.0, form: str = "{:g}") -> str:
    points = [(event["step"], event[key] / scale) for event in events if isinstance(event.get(key), int | float)]
    return curves(title, {key: points}, form)


def _training(steps: Sequence[Event]) -> list[str]:
    metrics = {key for step in steps for key, value in step.items() if isinstance(value, int | float)} - _NO_METRICS
    speed = [(step["step"], step["tokens"] / step["seconds"]) for step in steps]
    return [
        _curve("loss, a target token", steps, "loss"),
        *(_curve(key, steps, key) for key in sorted(metrics)),
        _curve("gradient norm", steps, "grad_norm"),
        _curve("learning rate", steps, "learning_rate"),
        curves("tokens a second", {"speed": speed}, "{:,.0f}"),
        _curve("share of what the device can compute", steps, "flops_utilisation", form="{:.0%}"),
        _curve("peak memory so far, GiB", steps, "memory_bytes", 2**30),
    ]


def _held_out(evals: Sequence[Event]) -> list[str]:
    if len(evals) < 3:  # the table says it
        return []
    drawn = [
        _curve("divergence from the teacher, nats", evals, "divergence"),
        _curve("cross-entropy, nats", evals, "cross_entropy"),
        _curve("top-1 agreement with the teacher", evals, "agreement", form="{:.0%}"),
    ]
    return [f'<h2>Held out, step by step</h2><div class="figures">{"".join(drawn)}</div>']


def _time(steps: Sequence[Event]) -> list[str]:
    if not steps:
        return []
    names = [name for name in steps[0]["phases"] if any(step["phases"].get(name) for step in steps)]
    sums = {name: sum(step["phases"].get(name, 0.0) for step in steps) for name in names}
    sums["other"] = max(0.0, sum(step["seconds"] for step in steps) - sum(sums.values()))
    whole = sum(sums.values()) or 1.0
    rows = [(name, f"{seconds:,.2f}", f"{seconds / whole:.1%}") for name, seconds in sums.items()]
    series = {name: [(step["step"], step["phases"].get(name, 0.0)) for step in steps] for name in names}
    return [
        "<h2>Where the time went</h2>", _table(rows, ("phase", "seconds", "share")),
        f'<div class="figures">{curves("seconds a step", series)}</div>',
    ]  # fmt: skip


def _samples(samples: Sequence[Event]) -> list[str]:
    shown = [f"<p>{_when(one['step'])}</p>{_pre(one['text'], one['prompt'])}" for one in samples]
    return ["<h2>The student's text</h2>", *shown] if shown else []


def _warnings(events: Sequence[Event]) -> list[str]:
    told = [
        f"<li>step {event['step']}: {escape(event.get('message', 'resumed'))}</li>"
        for event in events
        if event["event"] in ("warning", "resumed")
    ]
    return ["<h2>Warnings</h2>", f"<ul>{''.join(told)}</ul>"] if told else []


def _skipped(summary: Event | None) -> list[str]:
    skipped = summary["skipped"] if summary else []
    if not skipped:
        return []
    rows = [(one["sample"], one["reason"]) for one in skipped[:100]]
    more = f"<p>and {len(skipped) - 100:,} more, in summary.json</p>" if len(skipped) > 100 else ""
    return ["<h2>Samples that were skipped</h2>", _table(rows), more]
