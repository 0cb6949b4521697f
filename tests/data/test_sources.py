"""Files of JSON lines: what is read from them, and what is wrong with them, by file and line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kdflow import plugins
from kdflow.config import SourceConfig
from kdflow.contracts import DatasetReader, KdflowError, Sample
from kdflow.data.formats import Chat, PromptResponse, Text
from kdflow.data.sources import Source, Sources, open_sources
from tests.support.models import write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` keeps of each file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def contents(sources: Source | Sources) -> list[tuple[str, Sample]]:
    return [sources.sample(index) for index in range(len(sources))]


# --- what is read -----------------------------------------------------------------------------------------------------


def test_samples_are_named_by_file_and_line_and_blank_lines_are_none(path: Path) -> None:
    lines(path, '{"text": "one"}', "", '{"text": "two ☀"}', "  \t", '{"more": 1, "text": "three\\u2028\\n"}')
    assert contents(Source(path, Text())) == [
        (f"{path}:1", Sample(response="one")),
        (f"{path}:3", Sample(response="two ☀")),
        (f"{path}:5", Sample(response="three\u2028\n")),
    ]


def test_a_last_line_may_lack_its_end_and_lines_may_end_as_on_windows(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n\r\n{"text": "three"}')
    assert contents(Source(path, Text())) == [
        (f"{path}:1", Sample(response="one")),
        (f"{path}:2", Sample(response="two\r\n")),
        (f"{path}:4", Sample(response="three")),
    ]


def test_lines_may_have_different_fields(path: Path) -> None:
    write_jsonl(path, [{"text": "a", "n": 1}, {"text": "b", "n": "one"}, {"text": "c", "n": {"deep": [None]}}])
    assert [sample.response for _, sample in contents(Source(path, Text()))] == ["a", "b", "c"]


def test_every_format_reads_its_own(path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert contents(Source(Path(write_jsonl(path, [chat])), Chat()))[0][1] == Chat().read(chat)
    pair = {"prompt": "a", "response": "b"}
    assert contents(Source(Path(write_jsonl(path, [pair])), PromptResponse()))[0][1] == Sample(prompt="a", response="b")


def test_a_file_that_changed_is_read_again(path: Path) -> None:
    write_jsonl(path, [{"text": "one"}])
    assert len(Source(path, Text())) == 1
    write_jsonl(path, [{"text": "one"}, {"text": "two"}])
    assert len(Source(path, Text())) == 2
    before = path.stat()
    write_jsonl(path, [{"text": "one"}, {"text": "new"}])  # of the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert contents(Source(path, Text()))[1][1].response == "new"


def test_a_file_that_did_not_change_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(path, [{"text": "one"}])
    Source(path, Text())
    monkeypatch.setattr(Text, "read", lambda *_: pytest.fail("read again"))
    assert len(Source(path, Text())) == 1


def test_a_file_is_checked_anew_for_each_format(path: Path) -> None:
    write_jsonl(path, [{"text": "one"}])
    Source(path, Text())
    with pytest.raises(KdflowError, match=r"data.jsonl:1: the field 'prompt' is missing; the record has text"):
        Source(path, PromptResponse())


def test_files_follow_one_another(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "a"}, {"text": "b"}])
    second = write_jsonl(tmp_path / "second.jsonl", [{"prompt": "c", "response": "d"}])
    configs = [SourceConfig(path=first, format="text"), SourceConfig(path=second, format="prompt_response")]
    sources = open_sources([*configs, configs[0]], plugins.load())
    assert [name for name, _ in contents(sources)] == [
        f"{first}:1",
        f"{first}:2",
        f"{second}:1",
        f"{first}:1",
        f"{first}:2",
    ]
    assert sources.sample(2)[1] == Sample(prompt="c", response="d")
    with pytest.raises(IndexError):
        sources.sample(5)


def test_many_lines_are_not_held_in_memory_but_mapped(path: Path) -> None:
    write_jsonl(path, [{"text": f"text {number}"} for number in range(3000)])
    source = Source(path, Text())
    assert source._rows.cache_files
    assert [source.sample(index)[1].response for index in (0, 1999, 2999)] == ["text 0", "text 1999", "text 2999"]


def test_processes_may_open_the_same_file_at_once(path: Path, tmp_path: Path) -> None:
    write_jsonl(path, [{"text": f"text {number}"} for number in range(2000)])
    program = (
        "import sys; from pathlib import Path\n"
        "from kdflow.data.sources import Source; from kdflow.data.formats import Text\n"
        "source = Source(Path(sys.argv[1]), Text()); print(len(source), source.sample(1999)[1].response)"
    )
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path / "shared"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in running]
    assert [out for out, _ in ended] == ["2000 text 1999\n"] * 3, ended


# --- what is wrong ----------------------------------------------------------------------------------------------------

WRONG = {
    "no JSON": ('{"text": "a"', r":2: this line is no JSON: .* \(column \d+\)"),
    "two objects": ('{"text": "a"} {"text": "b"}', r":2: this line is no JSON: Extra data \(column 15\)"),
    "a list": ('["a"]', ":2: a line must be a JSON object, not list"),
    "a string": ('"a"', ":2: a line must be a JSON object, not str"),
    "null": ("null", ":2: a line must be a JSON object, not NoneType"),
    "a missing field": ('{"txt": "a", "id": 1}', ":2: the field 'text' is missing; the record has id, txt"),
    "no fields": ("{}", ":2: the field 'text' is missing; the record has no fields"),
    "another type": ('{"text": 3}', ":2: 'text' must be text, not 3"),
    "an empty text": ('{"text": ""}', ":2: 'text' is empty: there is nothing to learn"),
    "half a character": ('{"text": "a\\ud83d"}', ":2: .*surrogates not allowed"),
}


@pytest.mark.parametrize(("line", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_named(line: str, message: str, path: Path) -> None:
    lines(path, '{"text": "fine"}', line, '{"text": "fine"}')
    with pytest.raises(KdflowError, match=f"^{path}{message}"):
        Source(path, Text())


CHATS = {
    "no list": ({"messages": "a"}, "'messages' must be a list, not 'a'"),
    "empty": ({"messages": []}, "no turn has the role 'assistant'"),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no turn has the role 'assistant'"),
    "no object": ({"messages": ["a"]}, "message 1 must be an object with 'role' and 'content', not 'a'"),
    "no content": ({"messages": [{"role": "user"}]}, "message 1: 'content' must be text, not None"),
    "another role": ({"messages": [{"role": "human", "content": "a"}]}, "message 1: the role must be one of .*'human'"),
    "blank answer": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]},
                     "message 2, the assistant's, is empty"),
}  # fmt: skip


@pytest.mark.parametrize(("record", "message"), CHATS.values(), ids=CHATS)
def test_a_wrong_conversation_is_named(record: dict[str, Any], message: str, path: Path) -> None:
    with pytest.raises(KdflowError, match=f"^{path}:1: {message}"):
        Source(Path(write_jsonl(path, [record])), Chat())


@pytest.mark.parametrize(("record", "message"), [
    ({"prompt": "a"}, "the field 'response' is missing; the record has prompt"),
    ({"prompt": None, "response": "a"}, "'prompt' must be text, not None"),
    ({"prompt": "a", "response": ""}, "'response' is empty: there is nothing to learn"),
])  # fmt: skip
def test_a_wrong_prompt_or_response_is_named(record: dict[str, Any], message: str, path: Path) -> None:
    with pytest.raises(KdflowError, match=f"^{path}:1: {message}"):
        Source(Path(write_jsonl(path, [record])), PromptResponse())


def test_a_prompt_may_be_empty(path: Path) -> None:
    assert len(Source(Path(write_jsonl(path, [{"prompt": "", "response": "a"}])), PromptResponse())) == 1


@pytest.mark.parametrize("content", ["", "\n", " \n\n\t\n"])
def test_an_empty_file_is_named(content: str, path: Path) -> None:
    path.write_text(content)
    with pytest.raises(KdflowError, match=f"^{path}: the data file is empty$"):
        Source(path, Text())


def test_a_missing_file_or_a_directory_is_named(path: Path, tmp_path: Path) -> None:
    for missing in (path, tmp_path):
        with pytest.raises(KdflowError, match=f"^{missing}: there is no such data file$"):
            Source(missing, Text())


def test_a_file_that_is_not_utf8_is_named(path: Path) -> None:
    path.write_bytes(b'{"text": "fine"}\n{"text": "sch\xf6n"}\n')
    with pytest.raises(KdflowError, match=f"^{path}: the file is not UTF-8: .*byte 0xf6"):
        Source(path, Text())


def test_a_failure_leaves_nothing_behind_that_would_be_taken_for_the_file(path: Path) -> None:
    lines(path, '{"text": "fine"}', "{")
    for _ in range(2):
        with pytest.raises(KdflowError, match=":2: this line is no JSON"):
            Source(path, Text())


class Fickle(DatasetReader):
    """A plugin's reader, newer than what was checked when the file was first opened."""

    name = "fickle"
    longest = 10

    def read(self, record: Mapping[str, Any]) -> Sample:
        if len(record["text"]) > self.longest:
            raise ValueError("the text is too long for me")
        return Sample(response=record["text"])


def test_a_reader_that_changed_its_mind_is_named_with_its_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(Path(write_jsonl(path, [{"text": "short"}])), Fickle())
    monkeypatch.setattr(Fickle, "longest", 2)
    with pytest.raises(KdflowError, match=f"^{path}:1: the text is too long for me$"):
        source.sample(0)
