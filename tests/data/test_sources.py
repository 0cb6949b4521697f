"""Data sources: what is read from them, and what is wrong with them, by file and line."""

from __future__ import annotations

import bz2
import gzip
import inspect
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdflow.config import SourceConfig
from kdflow.contracts import DatasetReader, KdflowError, Sample
from kdflow.data import lines as line_files
from kdflow.data.formats import Chat, PromptResponse, Text
from kdflow.data.rendering import SideTokenizer
from kdflow.data.samples import Preparation
from kdflow.data.sources import open_records, stream_records
from kdflow.data.tokenization import PairTokenizer, Prepared
from tests.support.models import make_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of each file."""
    monkeypatch.setenv("KDFLOW_CACHE", str(tmp_path / "cache"))


class Source:
    """The samples of a source before any tokenizer, read as a whole and as a stream, which must agree."""

    def __init__(self, path: Path | str, reader: DatasetReader, **options: Any) -> None:
        config = SourceConfig(path=str(path), format=reader.name, **options)
        self.records = open_records(config)
        prepare = Preparation(reader, config.fields, _keep)  # type: ignore[arg-type]
        stored = [prepare(self.records[index]) for index in range(len(self.records))]
        assert list(map(prepare, stream_records(config).read(0))) == stored
        assert list(map(prepare, stream_records(config).read(1))) == stored[1:]
        for prepared in stored:
            if prepared.problem is not None:
                raise KdflowError(prepared.problem)
        self.samples = [(prepared.id, prepared.pair) for prepared in stored]

    def __len__(self) -> int:
        return len(self.samples)


def _keep(sample: Sample, name: str) -> Prepared:
    return Prepared(name, sample)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


def lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def contents(source: Source) -> list[Any]:
    return source.samples


# --- what is read -----------------------------------------------------------------------------------------------------


def test_samples_are_named_by_file_and_line_and_blank_lines_are_none(path: Path) -> None:
    lines(path, '{"text": "one"}', "", '{"text": "two ☀"}', "  \t", '{"more": 1, "text": "three\\u2028\\n"}')
    assert contents(Source(path, Text())) == [
        (f"{path}:1", Sample(response="one")),
        (f"{path}:3", Sample(response="two ☀")),
        (f"{path}:5", Sample(response="three\u2028\n")),
    ]


def test_a_last_line_may_lack_its_end_and_lines_may_end_as_on_windows(path: Path) -> None:
    for before, number in ((b"", 1), (b"\r\n \n", 3)):
        path.write_bytes(
            b"\xef\xbb\xbf" + before + b'{"text": "one"}\r\n{"text": "two\\r\\n"}\r\n\r\n{"text": "three"}'
        )
        assert contents(Source(path, Text())) == [
            (f"{path}:{number}", Sample(response="one")),
            (f"{path}:{number + 1}", Sample(response="two\r\n")),
            (f"{path}:{number + 3}", Sample(response="three")),
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


def test_a_file_is_read_again_by_other_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(path, [{"text": "one"}])

    def kept() -> tuple[str, str]:
        rows = Source(path, Text()).records._rows  # type: ignore[attr-defined]
        student = SideTokenizer(make_tokenizer(), "student")
        tokenize = PairTokenizer(student, None, max_length=64, too_long="truncate", same_targets=False)
        return rows.cache_files[0]["filename"], Preparation(Text(), {}, tokenize).key

    before, read = kept(), inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda of: read(of) + "#" * (of is line_files))
    assert all(new != old for new, old in zip(kept(), before, strict=True))


def test_a_file_is_checked_anew_for_each_format(path: Path) -> None:
    write_jsonl(path, [{"text": "one"}])
    Source(path, Text())
    with pytest.raises(KdflowError, match=r"data.jsonl:1: the field 'prompt' is missing; the record has text"):
        Source(path, PromptResponse())


def test_many_lines_are_not_held_in_memory_but_mapped(path: Path) -> None:
    write_jsonl(path, [{"text": f"text {number}"} for number in range(3000)])
    source = Source(path, Text())
    assert source.records._rows.cache_files  # type: ignore[attr-defined]
    assert [source.samples[index][1].response for index in (0, 1999, 2999)] == ["text 0", "text 1999", "text 2999"]


def test_processes_may_open_the_same_file_at_once(path: Path, tmp_path: Path) -> None:
    write_jsonl(path, [{"text": f"text {number}"} for number in range(2000)])
    program = (
        "import sys; from kdflow.config import SourceConfig; from kdflow.data.sources import open_records\n"
        "records = open_records(SourceConfig(path=sys.argv[1], format='text'))\n"
        "print(len(records), records[1999][1]['text'])"
    )
    environment = {
        **os.environ,
        "KDFLOW_CACHE": str(tmp_path / "shared"),
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


@pytest.mark.parametrize("parquet", [True, False])
def test_rows_of_another_content_and_the_same_date_are_read_again(parquet: bool, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for texts in (["one"], ["two", "three"]):
        if parquet:
            source = folder / "data.parquet"
            datasets.Dataset.from_dict({"text": texts}).to_parquet(str(source))
        else:
            source = folder
            lines(folder / "train.jsonl", *(json.dumps({"text": text}) for text in texts))
        for file in folder.iterdir():
            os.utime(file, (1_700_000_000, 1_700_000_000))
        assert [sample.response for _, sample in contents(Source(source, Text()))] == texts


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_was_kept_of_a_file_and_taken_away_is_made_again(kind: str, tmp_path: Path) -> None:
    source = tmp_path / f"data.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(str(source))
    else:
        lines(source, '{"text": "one"}')
    before = contents(Source(source, Text()))
    taken = list((tmp_path / "cache" / "records").rglob("*.arrow"))
    assert taken
    for file in taken:
        file.unlink()
    assert contents(Source(source, Text())) == before


# --- what is wrong ----------------------------------------------------------------------------------------------------

WRONG = {
    "no JSON": ('{"text": "a"', r":2: this line is no JSON: .* \(column \d+\)"),
    "several lines": (
        "{",
        ":2: this line is no JSON: a record begins here and goes on below; write each on one line, or all ",
    ),
    "two objects": ('{"text": "a"} {"text": "b"}', r":2: this line is no JSON: Extra data \(column 15\)"),
    "a list": ('["a"]', ":2: a record must be a JSON object, not list"),
    "a string": ('"a"', ":2: a record must be a JSON object, not str"),
    "null": ("null", ":2: a record must be a JSON object, not NoneType"),
    "a missing field": ('{"txt": "a", "id": 1}', ":2: the field 'text' is missing; the record has id, txt"),
    "no fields": ("{}", ":2: the field 'text' is missing; the record has no fields"),
    "another type": ('{"text": 3}', ":2: 'text' must be text, not 3"),
    "an empty text": ('{"text": ""}', ":2: 'text' is empty: there is nothing to learn"),
    "too deep": ("[" * 100_000, ":2: its values are nested too deeply to be read"),
    "half a character": ('{"text": "a\\ud83d"}', ":2: .*half a surrogate pair"),
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


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(KdflowError, match=f"^{path}: there is no such data file$"):
        Source(path, Text())


def test_a_missing_file_is_told_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    where = f"^data/a.jsonl: there is no such data file in {tmp_path}, where the command runs$"
    with pytest.raises(KdflowError, match=where):
        Source("data/a.jsonl", Text())


def test_a_line_that_is_not_utf8_is_named_and_can_be_skipped(path: Path, tmp_path: Path) -> None:
    fine = b'{"text": "fine"}\n' * 1000  # more than is read at a time
    path.write_bytes(fine + b'{"text": "sch\xf6n"}\n' + fine)
    problem = "this line is not UTF-8: byte 0xf6 at position 13; convert the file to UTF-8"
    with pytest.raises(KdflowError, match=f"^{path}:1001: {problem}"):
        Source(path, Text())
    config = SourceConfig(path=str(path), format="text")
    for records in (open_records(config), list(stream_records(config).read(0))):
        assert len(records) == 2001
        assert records[1000] == (f"{path}:1001", problem)
        assert records[1001] == (f"{path}:1002", {"text": "fine"})
    table = tmp_path / "data.csv"
    table.write_bytes(b"text\n" + b"fine\n" * 5000 + b"sch\xf6n\n")
    with pytest.raises(KdflowError, match=f"^{table}:5002: this line is not UTF-8: byte 0xf6 at position 3; convert"):
        Source(table, Text())
    array = tmp_path / "data.json"
    array.write_bytes(b'[\n{"text": "fine"},\n{"text": "sch\xf6n"}]')
    with pytest.raises(KdflowError, match=f"^{array}:3: this line is not UTF-8; convert"):
        Source(array, Text())


def test_a_failure_leaves_nothing_behind_that_would_be_taken_for_the_file(path: Path) -> None:
    lines(path, '{"text": "fine"}', "}")
    for _ in range(2):
        with pytest.raises(KdflowError, match=":2: this line is no JSON"):
            Source(path, Text())


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    table.write_text("text,id,text\na,1,b\n")
    with pytest.raises(KdflowError, match=f"^{table}:1: several columns are named 'text'; rename all but one$"):
        Source(table, Text())


@pytest.mark.parametrize(("reader", "record"), [
    (Text(), {"text": ["x" * 100_000]}),
    (Chat(), {"messages": json.dumps([{"role": "user", "content": "x" * 100_000}])}),
    (Chat(), {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 100_000}]}]}),
    (Chat(), {"messages": [["x" * 100_000]]}),
    (PromptResponse(), {"prompt": "a", "response": "b", "teacher_prompt": ["x" * 100_000]}),
])  # fmt: skip
def test_a_long_field_of_another_kind_is_not_quoted_whole(
    reader: DatasetReader, record: dict[str, Any], path: Path
) -> None:
    with pytest.raises(KdflowError, match=f"^{path}:1: .*not .*xxxx") as told:
        Source(Path(write_jsonl(path, [record])), reader)
    assert len(str(told.value)) < len(str(path)) + 200


PACKINGS = {
    "zstd": bytes.fromhex("28b52ffd2008410000 7b7d0a"),
    "xz": lzma.compress(b"{}\n"),
    "bzip2": bz2.compress(b"{}\n"),
    "zip": b"PK\x03\x04" + bytes(40),
}


@pytest.mark.parametrize(("packing", "content"), PACKINGS.items(), ids=PACKINGS)
def test_a_file_that_is_packed_otherwise_than_by_gzip_is_told(packing: str, content: bytes, path: Path) -> None:
    path.write_bytes(content)
    told = f"^{path}: this file is packed by {packing}: unpack it, or pack it by gzip instead$"
    with pytest.raises(KdflowError, match=told):
        Source(path, Text())
    with pytest.raises(KdflowError, match=told):
        list(stream_records(SourceConfig(path=str(path), format="text")).read(0))


def test_a_damaged_gzip_file_is_told(path: Path) -> None:
    packed = gzip.compress(b'{"text": "fine"}\n' * 1000)
    middle = len(packed) // 2
    other = bytes([packed[middle] ^ 255])
    for damaged in (packed[:-20], packed[:-8] + bytes(8), packed[:middle] + other + packed[middle + 1 :]):
        path.write_bytes(damaged)
        told = f"^{path}: this gzip file is damaged, or not all of it is there: "
        with pytest.raises(KdflowError, match=told):
            Source(path, Text())
        with pytest.raises(KdflowError, match=told):
            list(stream_records(SourceConfig(path=str(path), format="text")).read(0))


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [
    ("data.jsonl", '{"text": "eins"}\n\n{"text": "zwei ☀"}\n'),
    ("data.json", '\ufeff[{"text": "eins"}, {"text": "zwei ☀"}]'),
    ("data.csv", 'text,id\n"eins, zwei\n",1\n☀,2\n'),
    ("data.tsv", "\ufefftext\tid\neins\t1\n"),
])  # fmt: skip
def test_a_file_packed_by_gzip_is_read_as_the_file_itself(name: str, text: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_text(text, encoding="utf-8")
    packed.write_bytes(gzip.compress(text.encode()))
    expected = [(key.replace(name, f"{name}.gz"), sample) for key, sample in contents(Source(plain, Text()))]
    assert contents(Source(packed, Text())) == expected
    assert expected


def test_lines_of_a_gzip_file_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    table = tmp_path / "data.csv.gz"
    table.write_bytes(gzip.compress(b"text\n" + b"fine\n" * 5000 + b"sch\xf6n\n"))
    with pytest.raises(KdflowError, match=f"^{table}:5002: this line is not UTF-8: byte 0xf6 at position 3; convert"):
        Source(table, Text())


def test_a_json_array_is_read_record_by_record(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    pieces = ["[", '{"text": "one"},', '{"text": "two"}', "]"]
    line = "".join(pieces)
    for text in ("\n".join(pieces), f"{line}\n", f"\ufeff {line}", f"\ufeff\n \n{line}"):
        path.write_text(text, encoding="utf-8")
        assert contents(Source(path, Text())) == [
            (f"{path}[0]", Sample(response="one")),
            (f"{path}[1]", Sample(response="two")),
        ]
    path.write_text("[]")
    with pytest.raises(KdflowError, match=f"^{path}: the data file is empty$"):
        Source(path, Text())
    path.write_text('["one"]')
    with pytest.raises(KdflowError, match=rf"^{path}\[0\]: a record must be a JSON object, not str"):
        Source(path, Text())
    path.write_text('[\n {"text": "one"},\n {"text"}\n]')
    with pytest.raises(KdflowError, match=rf"^{path}:3: this is no JSON: "):
        Source(path, Text())
    path.write_text('\n[\n {"text": "one"},\n {"text"}\n]')
    with pytest.raises(KdflowError, match=rf"^{path}:4: this is no JSON: "):
        Source(path, Text())


def test_comma_and_tab_separated_values_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,response\n"a, ""b""\nc",d\n1,2\n', encoding="utf-8")
    assert contents(Source(path, PromptResponse())) == [
        (f"{path}:3", Sample(prompt='a, "b"\nc', response="d")),
        (f"{path}:4", Sample(prompt="1", response="2")),
    ]
    path.write_text("text\n" + "a" * 200_000 + "\n")  # more than csv takes unasked
    assert len(contents(Source(path, Text()))[0][1].response) == 200_000
    table = tmp_path / "data.TSV"
    table.write_text("prompt\tresponse\na,b\tc\n", encoding="utf-8")
    assert contents(Source(table, PromptResponse())) == [(f"{table}:2", Sample(prompt="a,b", response="c"))]


@pytest.mark.parametrize(("text", "message"), [
    ("prompt,response\na,b\na\n", ":3: the line has fewer values than the first line has names"),
    ("prompt,response\na,b,c\n", ":2: the line has more values than the first line has names"),
    ('prompt,response\n"a"b,c\n', ":2: this is no CSV: "),
    ("prompt,response\n", ": the data file is empty"),
    ("prompt,answer\na,b\n", ":2: the field 'response' is missing; the record has answer, prompt"),
])  # fmt: skip
def test_wrong_comma_separated_values_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(KdflowError, match=f"^{path}{message}"):
        Source(path, PromptResponse())


def test_parquet_is_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "me"}]] * 2
    datasets.Dataset.from_dict({"messages": chats}).to_parquet(str(path))
    first, second = contents(Source(path, Chat()))
    assert first == (f"{path}[0]", Chat().read({"messages": chats[0]}))
    assert second[0] == f"{path}[1]"
    path.write_bytes(b"PAR1 but no more")
    for opened in (open_records, stream_records):
        with pytest.raises(KdflowError, match=f"^{path}: this is no Parquet file"):
            opened(SourceConfig(path=str(path), format="chat"))


def test_fields_that_other_rows_of_a_table_have_are_none_of_a_rows_own(tmp_path: Path) -> None:
    """Arguments of tool calls and schemas of tools: what a template writes of them is learnt."""
    records: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "Go on"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "do", "arguments": arguments}]},
            ],
            "tools": [{"name": "do", "parameters": parameters}],
        }
        for arguments, parameters in (
            ({"city": "Paris"}, {"city": {"enum": ["Paris", None]}}),
            ({"a": 1, "b": {"c": [{"d": 2}, {"e": 3}]}}, {"a": {"type": "integer"}}),
        )
    ]
    rows = datasets.Dataset.from_list(records)
    assert "null" in json.dumps(rows[0]["messages"][1]["tool_calls"])
    rows.to_parquet(str(tmp_path / "data.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("data.parquet", "saved"):
        assert [sample for _, sample in contents(Source(tmp_path / name, Chat()))] == [
            Chat().read(record) for record in records
        ]


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_a_cache_that_cannot_be_made_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    rows = datasets.Dataset.from_dict({"text": ["one"]})
    rows.to_parquet(str(path)) if path.suffix == ".parquet" else rows.to_json(str(path))
    monkeypatch.setenv("KDFLOW_CACHE", str(path / "cache"))
    told = f"^{path}/cache/records cannot be made: Not a directory; mend it, or set KDFLOW_CACHE$"
    with pytest.raises(KdflowError, match=told):
        open_records(SourceConfig(path=str(path), format="text"))


def test_a_directory_that_datasets_saved(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "one"))
    assert contents(Source(tmp_path / "one", Text())) == [
        (f"{tmp_path}/one[0]", Sample(response="one")),
        (f"{tmp_path}/one[1]", Sample(response="two")),
    ]
    with pytest.raises(KdflowError, match=f"^{tmp_path}/one: this directory holds one data set without splits; leave"):
        Source(tmp_path / "one", Text(), split="test")
    datasets.DatasetDict({"train": rows, "held_out": rows.select([1])}).save_to_disk(str(tmp_path / "splits"))
    assert len(Source(tmp_path / "splits", Text())) == 2
    assert len(Source(tmp_path / "splits", Text(), split="held_out")) == 1
    with pytest.raises(KdflowError, match=f"^{tmp_path}/splits: there is no split 'test'; it has train, held_out$"):
        Source(tmp_path / "splits", Text(), split="test")


def test_a_mirror_of_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """A directory laid out as on the hub: a README that names configurations and the files of their splits."""
    for language, text in (("en", "one"), ("de", "eins")):
        (tmp_path / language).mkdir()
        for split in ("train", "validation"):
            write_jsonl(tmp_path / language / f"{split}.jsonl", [{"text": f"{text} {split}"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n"
            f"  - {{split: train, path: {name}/train.jsonl}}\n"
            f"  - {{split: validation, path: {name}/validation.jsonl}}\n"
            for name in ("en", "de")
        )
        + "---\n"
    )
    assert contents(Source(tmp_path, Text(), config="de")) == [(f"{tmp_path}[0]", Sample(response="eins train"))]
    validation = contents(Source(tmp_path, Text(), config="en", split="validation"))
    assert validation == [(f"{tmp_path}[0]", Sample(response="one validation"))]
    with pytest.raises(KdflowError, match=rf"^{tmp_path} \(config fr, split train\) cannot be loaded: .*fr"):
        Source(tmp_path, Text(), config="fr")
    with pytest.raises(KdflowError, match=r"split test.* cannot be loaded"):
        Source(tmp_path, Text(), config="en", split="test")


def test_options_of_the_hub_are_refused_where_they_would_do_nothing(path: Path, tmp_path: Path) -> None:
    write_jsonl(path, [{"text": "a"}])
    with pytest.raises(KdflowError, match=f"^{path} is a file: config, split belongs to a directory or a hub id"):
        Source(path, Text(), config="en", split="test")
    with pytest.raises(KdflowError, match="is on this machine: revision belongs to a hub id"):
        Source(tmp_path, Text(), revision="main")


def test_a_hub_id_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(KdflowError, match=r"^nobody/nothing \(config default, split train\) cannot be loaded: "):
        open_records(SourceConfig(path="nobody/nothing", format="text"))


def test_fields_are_read_from_elsewhere(path: Path) -> None:
    write_jsonl(path, [{"question": "a", "response": "b"}, {"q": "a", "response": "b"}])
    with pytest.raises(KdflowError, match=f"^{path}:2: the field 'question', named in fields, is missing; the record"):
        Source(path, PromptResponse(), fields={"prompt": "question"})
    write_jsonl(path, [{"question": "a", "response": "b"}])
    ((_, sample),) = contents(Source(path, PromptResponse(), fields={"prompt": "question"}))
    assert sample == Sample(prompt="a", response="b")
