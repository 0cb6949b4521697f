"""Tokenized samples: once, in workers, kept on disk, keyed by all that they depend on."""

from __future__ import annotations

import importlib
import os
import pwd
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from kdflow import plugins
from kdflow.cache import cache_directory
from kdflow.config import DataConfig
from kdflow.contracts import DatasetReader, KdflowError, Message, Sample
from kdflow.data import samples
from kdflow.data.rendering import SideTokenizer
from kdflow.data.samples import Preparation, SampleTable, open_streams, open_tables
from kdflow.data.tokenization import PairTokenizer, Prepared
from tests.support.commands import site
from tests.support.distributions import Distribution, plugin
from tests.support.models import make_tokenizer, write_jsonl

__all__ = ["site"]

TEXTS = [f"It is a truth universally acknowledged, number {number}." for number in range(30)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path / "cache"))


def pair_tokenizer(**options: Any) -> PairTokenizer:
    side = SideTokenizer(make_tokenizer(), "student")
    return PairTokenizer(side, side, **{"max_length": 64, "too_long": "truncate", "same_targets": True, **options})


@pytest.fixture
def open_table(tmp_path: Path) -> Callable[..., SampleTable]:
    write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])

    def opened(tokenize: PairTokenizer | None = None, source: Any = None, **data: Any) -> SampleTable:
        train = [{"path": str(tmp_path / "data.jsonl"), "format": "text", **(source or {})}]
        config = DataConfig(train=train, **data)  # type: ignore[arg-type]
        return open_tables(config.train, config, plugins.load(), tokenize or pair_tokenizer())[0]

    return opened


def same(one: Prepared, other: Prepared) -> bool:
    if one.pair is None or other.pair is None:
        return one == other
    sides = zip((one.pair.student, one.pair.teacher), (other.pair.student, other.pair.teacher), strict=True)
    own = [(prepared.id, prepared.truncated, pair.chat) for prepared, pair in ((one, one.pair), (other, other.pair))]
    return own[0] == own[1] and all(
        np.array_equal(getattr(a, part), getattr(b, part)) and a.text_bytes == b.text_bytes
        for a, b in sides
        if a is not None or b is not None
        for part in ("ids", "targets", "response")
    )


@pytest.mark.parametrize("options", [{}, {"max_length": 12}, {"max_length": 12, "too_long": "drop"}])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_table_holds_what_the_tokenizer_gives(
    options: dict[str, Any], workers: int, open_table: Callable[..., SampleTable], tmp_path: Path
) -> None:
    tokenize = pair_tokenizer(**options)
    table = open_table(tokenize, workers=workers)
    expected = [tokenize(Sample(response=text), f"{tmp_path}/data.jsonl:{n}") for n, text in enumerate(TEXTS, start=1)]
    assert len(table) == len(expected)
    assert all(same(table[index], prepared) for index, prepared in enumerate(expected))
    assert table[0].pair is None or table[0].pair.student.ids.dtype == np.int64
    assert table.lengths.tolist() == [0 if e.pair is None else len(e.pair.student) for e in expected]


@pytest.mark.parametrize("damage", [
    lambda files: files[0].unlink(),
    lambda files: [file.unlink() for file in files],
    lambda files: files[1].write_bytes(files[1].read_bytes()[:-700]),
    lambda files: files[1].write_bytes(b""),
])  # fmt: skip
def test_tokens_that_are_not_all_there_any_more_are_made_again(
    damage: Callable[[list[Path]], object], open_table: Callable[..., SampleTable]
) -> None:
    table = open_table(workers=2)
    expected = [table[index] for index in range(len(table))]
    files = sorted((cache_directory() / "tokens").glob("*/*.arrow"))
    assert len(files) == 2
    damage(files)
    again = open_table(workers=2)
    assert len(again) == len(expected)
    assert all(same(again[index], one) for index, one in enumerate(expected))


def test_no_room_for_tokens_is_told_and_leaves_nothing(tmp_path: Path, open_table: Callable[..., SampleTable]) -> None:
    open_table()  # so that the records are kept
    shutil.rmtree(cache_directory() / "tokens")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(KdflowError, match=rf"^{tmp_path}/cache/tokens cannot be written to: .*set KDFLOW_CACHE$"):
            open_table()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.suffix for path in (cache_directory() / "tokens").iterdir()] == [".lock"]


def test_a_worker_that_is_killed_is_told(
    open_table: Callable[..., SampleTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What datasets says then. Not by a kill: the pool forks another worker at once, which it may wait for without end.
    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("One of the subprocesses has abruptly died during map operation.")

    monkeypatch.setattr(datasets.Dataset, "map", killed)
    with pytest.raises(KdflowError, match=r"data\.jsonl was killed, most likely since memory ran out: data.workers=1"):
        open_table(workers=2)
    assert not list((cache_directory() / "tokens").glob("*.part"))


def test_without_a_teacher_there_is_no_teachers_side(open_table: Callable[..., SampleTable]) -> None:
    alone = PairTokenizer(
        SideTokenizer(make_tokenizer(), "student"), None, max_length=64, too_long="drop", same_targets=False
    )
    pair = open_table(alone)[0].pair
    assert pair is not None
    assert pair.teacher is None


def test_what_was_tokenized_is_found_again_until_something_changes(
    open_table: Callable[..., SampleTable], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    tokenize = Preparation.__call__

    def counted(self: Preparation, record: Any) -> Prepared:
        calls.append(record[0])
        return tokenize(self, record)

    monkeypatch.setattr(Preparation, "__call__", counted)

    def read(*arguments: Any, **options: Any) -> int:
        before = len(calls)
        open_table(*arguments, **options, workers=1)
        return len(calls) - before

    assert read() == len(TEXTS)
    assert read() == 0
    assert read(pair_tokenizer(max_length=63)) == len(TEXTS)
    assert read(pair_tokenizer(too_long="drop")) == len(TEXTS)
    assert read(source={"fields": {"text": "text"}}) == len(TEXTS)
    assert read(on_error="skip", source={"weight": 2.0}) == 0
    other = pair_tokenizer()
    other.student.tokenizer.chat_template = "{{ messages }}"
    assert read(other) == len(TEXTS)
    write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS[::-1]])
    assert read() == len(TEXTS)
    assert read() == 0


def test_options_of_the_format_are_part_of_the_key() -> None:
    def preparation(**options: Any) -> Preparation:
        cls = plugins.load().find("chat", "data format").cls
        return Preparation(cls(cls.Options(**options)), {}, pair_tokenizer())  # type: ignore[attr-defined]

    keys = {preparation(**options).key for options in ({}, {"system": "Be kind."}, {"turns": "last"}, {})}
    assert len(keys) == 3


LINES = {
    "kdflow_lines/__init__": """
from lines_base import Base

class Lines(Base):
    name = "lines"
    def read(self, record):
        from kdflow_lines.clean import clean
        return self.sample(clean(record["line"]))
""",
    "kdflow_lines/clean": "clean = str.strip\n",
    "lines_base": """
from kdflow.contracts import DatasetReader, Sample

class Base(DatasetReader):
    def sample(self, text):
        return Sample(response=text)
""",
}


@pytest.mark.parametrize("changed", LINES)
def test_all_code_of_a_readers_package_and_of_its_bases_is_part_of_the_key(changed: str, site: Path) -> None:
    Distribution("lines", LINES).install(site)
    (site / "kdflow_lines" / ".#clean.py").symlink_to("nowhere")  # as an editor has it of a file that is changed
    prepare = Preparation(importlib.import_module("kdflow_lines").Lines(), {}, pair_tokenizer())
    before = prepare.key
    assert prepare(("a.jsonl:1", {"line": " a line "})).pair is not None
    assert prepare.key == before, "what is loaded where it is used counts from the start"
    with (site / f"{changed}.py").open("a") as file:
        file.write("# changed\n")
    assert prepare.key != before


def test_a_table_that_was_not_finished_is_made_anew(open_table: Callable[..., SampleTable]) -> None:
    open_table()
    (finished,) = (path for path in (cache_directory() / "tokens").iterdir() if path.is_dir())
    partial = finished.with_name(f"{finished.name}.part")
    shutil.move(finished, partial)
    (partial / "tokens.arrow").write_bytes(b"half of a ta")
    assert len(open_table()) == len(TEXTS)
    assert not partial.exists()


def test_a_folder_of_the_cache_that_cannot_be_made_is_named(
    open_table: Callable[..., SampleTable], tmp_path: Path
) -> None:
    cache_directory().mkdir()
    (cache_directory() / "tokens").write_text("in the way")
    told = f"^{tmp_path}/cache/tokens cannot be made: File exists; mend it, or set KDFLOW_CACHE$"
    with pytest.raises(KdflowError, match=told):
        open_table()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("KDFLOW_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(KdflowError, match=r"^no folder for kdflow's cache: .* Set KDFLOW_CACHE or HOME$"):
        cache_directory()


def test_records_that_cannot_be_used_end_the_run_or_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": 1}\n{\n{"text": "fine"}\n')
    config = DataConfig(train=[{"path": str(path), "format": "text"}])  # type: ignore[list-item]
    other = re.escape("If another one holds it, name it in the source: fields: {text: …}")
    with pytest.raises(
        KdflowError, match=rf"^{path}:2: the field 'text' is missing; the record has txt\. {other}\nand 1 more like"
    ):
        open_tables(config.train, config, plugins.load(), pair_tokenizer())
    (table,) = open_tables(
        config.train, config.model_copy(update={"on_error": "skip"}), plugins.load(), pair_tokenizer()
    )
    assert [name for name, _ in table.problems] == [f"{path}:2", f"{path}:3"]
    assert [prepared.pair is None for prepared in map(table.__getitem__, range(4))] == [False, True, True, False]
    (stream,) = open_streams(config.train, plugins.load(), pair_tokenizer())
    assert all(same(streamed, table[index]) for index, streamed in enumerate(stream.read(0)))


def test_a_conversation_is_known_by_what_its_reader_gives(site: Path, tmp_path: Path) -> None:
    module = "import kdflow\nfrom kdflow.data.formats import Chat\n\nclass Share(Chat):\n    name = 'sharegpt'\n\n"
    module += "@kdflow.hookimpl\ndef kdflow_datasets():\n    return [Share]\n"
    plugin("kdflow_share", module).install(site)
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Fine."}]
    records: dict[str, dict[str, Any]] = {
        "sharegpt": {"messages": turns}, "chat": {"messages": turns},
        "prompt_response": {"prompt": "Well?", "response": "Fine."}, "text": {"text": "Fine."},
    }  # fmt: skip
    for name, record in records.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{}, record, record])
        config = DataConfig(train=[{"path": path, "format": name}], on_error="skip")  # type: ignore[list-item]
        (table,) = open_tables(config.train, config, plugins.load(), pair_tokenizer())
        (stream,) = open_streams(config.train, plugins.load(), pair_tokenizer())
        chat = "messages" in record
        assert table.chat == stream.chat == chat, name
        for prepared in (table[1], next(stream.read(1))):
            assert prepared.pair is not None
            assert prepared.pair.chat == chat
    path = write_jsonl(tmp_path / "useless.jsonl", [{}])
    config = DataConfig(train=[{"path": path, "format": "chat"}], on_error="skip")  # type: ignore[list-item]
    assert not open_tables(config.train, config, plugins.load(), pair_tokenizer())[0].chat
    assert not open_streams(config.train, plugins.load(), pair_tokenizer())[0].chat


@contextmanager
def often_switching() -> Iterator[None]:
    """Between threads, as seldom happens on a quiet machine."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_a_stream_is_read_beside_other_uses_of_its_tokenizer(tmp_path: Path) -> None:
    """By another thread, while this one encodes text whose special tokens count as such."""
    special = "<|im_start|> and <|im_end|> are text in a response. " * 4
    write_jsonl(tmp_path / "data.jsonl", [{"text": f"{number} {special}"} for number in range(1000)])
    config, tokenize = DataConfig(train=[{"path": str(tmp_path / "data.jsonl"), "format": "text"}]), pair_tokenizer()  # type: ignore[list-item]
    (stream,) = open_streams(config.train, plugins.load(), tokenize)
    expected = list(stream.read(0))
    with ThreadPoolExecutor(1) as thread, often_switching():
        reading = thread.submit(list, stream.read(0))
        while not reading.done():
            tokenize.student.encode(special, special=True)
    assert all(same(one, other) for one, other in zip(reading.result(), expected, strict=True))


class Picky(DatasetReader):
    """A reader that says no in its own words."""

    name = "picky"

    def read(self, record: Mapping[str, Any]) -> Sample:
        raise ValueError("I do not like it")


def test_a_readers_own_error_is_told_with_the_line() -> None:
    prepared = Preparation(Picky(), {}, pair_tokenizer())(("data.jsonl:3", {"text": "a"}))
    assert prepared == Prepared("data.jsonl:3", problem="data.jsonl:3: I do not like it")


class Strip(DatasetReader):
    """A reader that takes for granted what a record holds."""

    name = "strip"

    def read(self, record: Mapping[str, Any]) -> Sample:
        return Sample(prompt=record["prompt"].strip()[0], response=record["response"] + "!")


@pytest.mark.parametrize(("record", "error"), [
    ({"prompt": None, "response": "b"}, "AttributeError: 'NoneType' object has no attribute 'strip'"),
    ({"prompt": " ", "response": "b"}, "IndexError: string index out of range"),
    ({"prompt": "a", "response": 4}, "TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
])  # fmt: skip
def test_what_a_reader_fails_at_is_told_with_the_line(record: dict[str, Any], error: str) -> None:
    prepared = Preparation(Strip(), {}, pair_tokenizer())(("data.jsonl:3", record))
    told = f"data.jsonl:3: the reader of the format 'strip' failed: {error}"
    assert prepared == Prepared("data.jsonl:3", problem=told)


class Given(DatasetReader):
    """A reader that reads nothing: it gives what the record holds, if it has it."""

    name = "given"

    def read(self, record: Mapping[str, Any]) -> Sample:
        given: Sample = record["sample"]
        return given


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"b": 1, "a": 2}, "found no 'sample'; the record has a, b"),
        ({"sample": {"prompt": "a"}}, "gave {'prompt': 'a'}, not a Sample"),
        ({"sample": None}, "gave None, not a Sample"),
        ({"sample": Sample(prompt="a", response=7)}, "gave 7 as response, not text"),  # type: ignore[arg-type]
        ({"sample": Sample(prompt=None, response="a")}, "gave None as prompt, not text"),  # type: ignore[arg-type]
        ({"sample": Sample(None, response="a")}, "gave None as messages, not a tuple of them"),  # type: ignore[arg-type]
        (
            {"sample": Sample(prompt="a", response="b", teacher_prompt=["c"])},  # type: ignore[arg-type]
            "gave ['c'] as teacher_prompt, not text",
        ),
        (
            {"sample": Sample((Message("user", "a"), {"role": "assistant"}))},  # type: ignore[arg-type]
            "gave {'role': 'assistant'} as message 2, not a Message",
        ),
        (
            {"sample": Sample((Message("user", "a"), Message("assistant", None, True)))},  # type: ignore[arg-type]
            "gave None as message 2's content, not text",
        ),
        (
            {"sample": Sample((Message("user", "a"), Message(3, None), Message("assistant", None)))},  # type: ignore[arg-type]
            "gave 3 as message 2's role, not text",
        ),
        (
            {"sample": Sample((Message("user", None), "b"), prompt=None)},  # type: ignore[arg-type]
            "gave 'b' as message 2, not a Message",
        ),
        (
            {"sample": Sample((Message("user", None),), response=None)},  # type: ignore[arg-type]
            "gave None as response, not text",
        ),
    ],
)
def test_what_a_reader_does_wrong_is_told_as_its_own(record: dict[str, Any], problem: str) -> None:
    prepared = Preparation(Given(), {}, pair_tokenizer())(("data.jsonl:3", record))
    assert prepared == Prepared("data.jsonl:3", problem=f"data.jsonl:3: the reader of the format 'given' {problem}")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """How many each call has started to tokenize."""
    started: list[int | None] = []
    real = samples.datasets.Dataset.map
    monkeypatch.setattr(
        samples.datasets.Dataset, "map", lambda *a, **k: (started.append(k["num_proc"]), real(*a, **k))[1]
    )
    return started


def test_small_data_starts_no_processes(open_table: Callable[..., SampleTable], processes: list[int | None]) -> None:
    open_table()
    open_table(pair_tokenizer(max_length=50), workers=2)
    assert processes == [None, 2]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="needs a core to leave alone")
def test_a_core_that_the_process_may_not_use_gets_no_worker(
    open_table: Callable[..., SampleTable], processes: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_ROWS_PER_WORKER", 1)
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        open_table()
    finally:
        os.sched_setaffinity(0, cores)
    assert processes == [None]


def test_the_environment_stays_what_it_is(open_table: Callable[..., SampleTable]) -> None:
    environment = os.environ
    open_table(workers=2)
    assert os.environ is environment
