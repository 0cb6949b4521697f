"""``kdflow align``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kdflow.cli import app
from kdflow.cli.console import stdout
from kdflow.cli.options import Json, choice
from kdflow.contracts import Aligner, Alignment, KdflowError, Sample, TargetAlignment
from kdflow.plugins import load

if TYPE_CHECKING:
    from kdflow.tokenizers import Tokenizer

_STYLES = {"one_to_one": "green", "spanning": "yellow", "unmatched": "red"}
_NAMES = {"one_to_one": "one-to-one", "spanning": "in spans of several", "unmatched": "unmatched"}
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
_GAP = 2  # columns between spans; no token holds one, since spaces are shown


def _aligners(incomplete: str) -> list[str]:
    """For completion in a shell."""
    return [entry.name for entry in load().of_kind("aligner") if entry.name.startswith(incomplete)]


@dataclass(frozen=True)
class _Side:
    """A text in the tokens of one model."""

    tokenizer: Tokenizer
    ids: list[int]
    tokens: list[bytes]
    losses: list[str]  # what of the text its tokens do not give back, and why

    def shown(self, span: slice) -> str:
        """The tokens of a span, for people."""
        pairs = zip(self.ids[span], self.tokens[span], strict=True)
        return "│".join(self.tokenizer.special.tokens.get(index) or _readable(token) for index, token in pairs)


@app.command()
def align(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(help="The text to align, or give --file.")] = None,
    *,
    student: Annotated[str, typer.Option(help="The student's tokenizer: a directory, a file of one, or a hub id.")],
    teacher: Annotated[str, typer.Option(help="The teacher's tokenizer, likewise.")],
    file: Annotated[Path | None, typer.Option(help="A file with the text, in UTF-8.")] = None,
    aligner: Annotated[
        str,
        typer.Option(
            autocompletion=_aligners, help="byte_span, min_edit, identity, or '{name: min_edit, match_cost: fusechat}'."
        ),
    ] = "byte_span",
    as_json: Json = False,
) -> None:
    """Show how two models' tokens of a text are paired, and for how many of the student's there is a partner."""
    from kdflow.data.alignment import ResponseAligner, aligned
    from kdflow.tokenizers import load as load_tokenizer

    named = choice(aligner, "--aligner", "{name: min_edit, match_cost: fusechat}")
    chosen = load(ctx.obj).aligner(named.name, **named.options())
    given = _text(text, file)
    models = [load_tokenizer(student), load_tokenizer(teacher)]
    # As in a run: where one of the tokenizers changes a text before it splits it, both get the changed one.
    normal = ResponseAligner(chosen, *models).same_text(Sample(response=given)).response
    ours, theirs = (_side(model, normal) for model in models)
    try:
        found = aligned(chosen, ours.tokens, theirs.tokens)
    except ValueError as error:
        losses = "".join(f"\n{loss}" for side in (ours, theirs) for loss in side.losses)
        raise KdflowError(f"aligner '{named.name}' cannot align this text: {error}{losses}") from None
    if as_json:
        print(json.dumps(_as_json(chosen, normal, ours, theirs, found), indent=2))
        return
    console = stdout()
    _show_spans(console, ours, theirs, found)
    rules = ", ".join(dict.fromkeys(rule for model in models for rule in model.normalizes))
    notes = [f"both sides get the text as the tokenizers change it before they split it: {rules}"]
    for note in (*(notes if normal != given else ()), *ours.losses, *theirs.losses):
        console.print(escape(note), soft_wrap=True)
    console.print(_table(found))


def _text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise KdflowError("expected a text or --file, and not both: kdflow align --student A --teacher B 'Some text.'")
    if file is not None:
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise KdflowError(f"--file {file} is not UTF-8 at byte {error.start}: convert it first") from None
        except OSError as error:
            raise KdflowError(f"--file {file} cannot be read: {error.strerror}") from None
    if not text:
        raise KdflowError(f"{'the text' if file is None else f'--file {file}'} is empty: there is nothing to align")
    return text


def _side(tokenizer: Tokenizer, text: str) -> _Side:
    from kdflow.tokenizers import roundtrip

    way = roundtrip(tokenizer, text)
    losses = [f"{tokenizer.source}: {reason}" for reason in way.reasons.values()]
    return _Side(tokenizer, way.ids, tokenizer.token_bytes(way.ids), losses)


def _readable(token: bytes) -> str:
    """A token for people: spaces and control characters are visible, bytes that are a part of a character in hex."""
    if not token:
        return "∅"
    text = "".join(map(_visible, token.decode("utf-8", "surrogateescape")))
    return re.sub("[\udc80-\udcff]+", lambda part: f"<{part[0].encode('utf-8', 'surrogateescape').hex(' ')}>", text)


def _visible(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if character < " ":
        return chr(0x2400 + ord(character))  # its picture
    surrogate = "\udc80" <= character <= "\udcff"
    return character if character.isprintable() or surrogate else f"<U+{ord(character):04X}>"


def _show_spans(console: Console, ours: _Side, theirs: _Side, found: Alignment) -> None:
    """The student's tokens above the teacher's, span by span, in as many lines as the width asks for."""

    def start() -> list[Text]:
        return [Text().append(f"{name}  ", "dim") for name in ("student", "teacher")]

    lines, empty = start(), True
    for student, teacher in found.spans:
        cells = ours.shown(student), theirs.shown(teacher)
        width = max(map(cell_len, cells))
        if not empty and lines[0].cell_len + width > console.width:
            _print(console, lines)
            lines = start()
        for line, cell in zip(lines, cells, strict=True):
            line.append(cell, _STYLES[_kind(student, teacher)])
            line.append(" " * (width - cell_len(cell) + _GAP))
        empty = False
    _print(console, lines)


def _kind(student: slice, teacher: slice) -> str:
    """What a span is in the table: it counts the student's tokens by that."""
    ours, theirs = student.stop - student.start, teacher.stop - teacher.start
    if not ours or not theirs:
        return "unmatched"
    return "one_to_one" if ours == theirs == 1 else "spanning"


def _print(console: Console, lines: Sequence[Text]) -> None:
    for line in lines:
        line.rstrip()
        console.print(line, soft_wrap=True)
    console.print()


def _table(found: Alignment) -> Table:
    rows = Table("the student's tokens")
    for name in ("tokens", "share"):
        rows.add_column(name, justify="right")
    for key, (count, share) in _shares(found).items():
        rows.add_row(f"[{_STYLES[key]}]{_NAMES[key]}[/]", f"{count:,}", "-" if share is None else f"{share:.1%}")
    return rows


def _shares(found: Alignment) -> dict[str, tuple[int, float | None]]:
    """How many of the student's tokens are aligned one-to-one, in longer spans, or not; and the share of all."""
    from kdflow.data.alignment import numbered

    counts = TargetAlignment(*numbered(found.stops)).shares()
    total = sum(counts.values())
    return {key: (count, count / total if total else None) for key, count in counts.items()}


def _as_json(aligner: Aligner, text: str, ours: _Side, theirs: _Side, found: Alignment) -> dict[str, object]:
    return {
        "aligner": aligner.name,
        "options": aligner.options.model_dump(),
        "text": text,
        **{
            name: {
                "tokenizer": side.tokenizer.source,
                "ids": side.ids,
                "tokens": [token.hex() for token in side.tokens],
                "losses": side.losses,
            }
            for name, side in (("student", ours), ("teacher", theirs))
        },
        "spans": [
            {"student": [one.start, one.stop], "teacher": [other.start, other.stop]} for one, other in found.spans
        ],
        "shares": {key: {"tokens": count, "share": share} for key, (count, share) in _shares(found).items()},
    }
