"""``kdflow align``: what it shows of two tokenizers, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import WordPiece

from tests.support.commands import Command, site
from tests.support.distributions import plugin
from tests.support.models import make_tokenizer
from tests.support.small import write_sentencepiece, write_tokenizer_json

__all__ = ["site"]

SHORT, LONG, PIECES, UNKNOWN, NFC = "short", "long", "pieces.model", "unknown.model", "nfc"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizers of few tokens and of more, sentencepiece models, and one that normalizes."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer_json(root / SHORT, vocab_size=260)
    write_tokenizer_json(root / LONG, vocab_size=384)
    write_sentencepiece(root / PIECES)
    write_sentencepiece(root / UNKNOWN, byte_fallback=False)
    tokenizer = make_tokenizer(vocab_size=300)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(root / NFC)
    return root


@pytest.fixture
def align(command: Command, made: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Aligns with two of these tokenizers."""
    monkeypatch.chdir(made)

    def call(student: str, teacher: str, *arguments: object) -> Any:
        return command("align", "--student", f"./{student}", "--teacher", f"./{teacher}", *arguments)

    return call


def found(align: Command, *arguments: object) -> dict[str, Any]:
    result = align(*arguments, "--json")
    assert (result.code, result.err) == (0, "")
    parsed: dict[str, Any] = json.loads(result.out)
    return parsed


# --- what is found ---------------------------------------------------------------------------------------------------


def test_json_holds_spans_of_equal_bytes_and_the_shares(align: Command) -> None:
    text = "The quick brown fox, 狐狸\nand the hen"
    told = found(align, SHORT, LONG, text)
    assert (told["aligner"], told["text"]) == ("byte_span", text)
    sides = [b"".join(map(bytes.fromhex, told[side]["tokens"])) for side in ("student", "teacher")]
    assert sides == [text.encode(), text.encode()]
    counts = dict.fromkeys(("one_to_one", "spanning", "unmatched"), 0)
    for span in told["spans"]:
        spelt = ["".join(told[side]["tokens"][slice(*span[side])]) for side in ("student", "teacher")]
        assert spelt[0] == spelt[1]
        sizes = [stop - start for start, stop in (span["student"], span["teacher"])]
        counts["one_to_one" if sizes == [1, 1] else "spanning"] += sizes[0]
    assert {key: share["tokens"] for key, share in told["shares"].items()} == counts
    assert min(counts["one_to_one"], counts["spanning"]) > 3
    assert sum(share["share"] for share in told["shares"].values()) == pytest.approx(1)
    assert len(told["student"]["ids"]) == sum(counts.values()) > len(told["teacher"]["ids"])


def test_both_sides_get_the_text_as_the_one_that_normalizes_makes_it(align: Command) -> None:
    for sides in ((NFC, LONG), (LONG, NFC)):
        told = found(align, *sides, "cafe\u0301 noir")
        assert told["text"] == "café noir"
        assert told["student"]["losses"] == told["teacher"]["losses"] == []
    told = "both sides get the text as the tokenizers change it before they split it: NFC"
    assert told in align(LONG, NFC, "cafe\u0301 noir").out
    assert "both sides get" not in align(LONG, NFC, "café noir").out
    assert found(align, LONG, SHORT, "cafe\u0301 noir")["text"] == "cafe\u0301 noir"


def test_the_space_that_sentencepiece_puts_before_a_text_is_no_part_of_it(align: Command) -> None:
    told = found(align, PIECES, LONG, "and the hen")
    assert bytes.fromhex("".join(told["student"]["tokens"])) == b"and the hen"
    assert told["spans"][0]["student"][0] == told["spans"][0]["teacher"][0] == 0


def test_what_a_model_takes_for_a_space_is_one_to_both(align: Command) -> None:
    told = found(align, LONG, PIECES, "a▁b")
    assert [bytes.fromhex("".join(told[side]["tokens"])) for side in ("student", "teacher")] == [b"a b", b"a b"]


def test_a_file_is_read_as_it_is(align: Command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("one\r\nzwei 狐\n".encode())
    assert found(align, SHORT, LONG, "--file", tmp_path / "text.txt")["text"] == "one\r\nzwei 狐\n"


def test_other_aligners_also_pair_texts_that_differ(align: Command) -> None:
    identity = found(align, SHORT, LONG, "the hen", "--aligner", "identity")["shares"]
    assert identity["unmatched"]["tokens"] > 0 == identity["spanning"]["tokens"]
    told = align(LONG, UNKNOWN, "the 狐", "--aligner", "min_edit")
    assert told.code == 0
    assert f"{UNKNOWN}: 1 tokens are <unk>" in told.out
    assert told.out.splitlines()[1].endswith("<unk>")


def test_an_aligner_takes_its_options(align: Command) -> None:
    sides = SHORT, LONG, "the hen", "--aligner"
    told = found(align, *sides, "{name: min_edit, match_cost: fusechat}")
    assert (told["aligner"], told["options"]) == ("min_edit", {"match_cost": "fusechat"})
    assert found(align, *sides, "min_edit")["options"] == {"match_cost": "fusellm"}
    assert found(align, *sides, "byte_span")["options"] == {}


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_students_tokens_stand_above_the_teachers(align: Command) -> None:
    lines = align(SHORT, SHORT, "a b\n\t狐\0\u200d").out.splitlines()
    shown = "a  ␣  b  ↵  ⇥  <e7>  <8b>  <90>  ␀"
    assert [line[:9] for line in lines[:2]] == ["student  ", "teacher  "]
    assert [line[9:].startswith(shown) for line in lines[:2]] == [True, True]
    lines = align(SHORT, LONG, "xhe").out.splitlines()
    assert [line.split() for line in lines[:2]] == [["student", "x", "h│e"], ["teacher", "x", "he"]]


def test_a_whole_character_that_cannot_be_seen_is_named(align: Command, made: Path) -> None:
    joiner = make_tokenizer(vocab_size=262, corpus=["\u200d"] * 9)
    joiner.save_pretrained(made / "joiner")
    lines = align("joiner", SHORT, "\u200d\u200d").out.splitlines()
    assert [line.split()[1:] for line in lines[:2]] == [["<U+200D>"] * 2, ["<e2>│<80>│<8d>"] * 2]


def test_a_long_text_is_broken_between_spans(align: Command) -> None:
    out = align(SHORT, LONG, "the quick brown fox " * 40).out
    lines = [line for line in out.splitlines() if line.startswith(("student ", "teacher "))]
    assert len(lines) > 4
    assert max(map(len, lines)) <= 200
    assert [line[:7] for line in lines] == ["student", "teacher"] * (len(lines) // 2)
    told = "".join(line[9:].replace("  ", "").replace("│", "") for line in lines[::2]).replace(" ", "")
    assert told == "the␣quick␣brown␣fox␣" * 40


def test_the_shares_are_a_table(align: Command) -> None:
    out = align(SHORT, LONG, "the hen").out
    rows = re.findall(r"│ (one-to-one|in spans of several|unmatched) +│ +(\d+) │ +([\d.]+)% │", out)
    assert [name for name, *_ in rows] == ["one-to-one", "in spans of several", "unmatched"]
    assert sum(int(count) for _, count, _ in rows) == len(found(align, SHORT, LONG, "the hen")["student"]["ids"])


def test_a_span_has_the_colour_of_its_row_in_the_table(align: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b[" not in align(SHORT, LONG, "xhe").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = align(SHORT, LONG, "xhe").out
    for colour, shown in ((32, "x"), (33, "he"), (32, "one-to-one"), (33, "in spans of several"), (31, "unmatched")):
        assert f"\x1b[{colour}m{shown}\x1b[0m" in out
    out = align(SHORT, LONG, "xhe", "--aligner", "identity").out
    assert "\x1b[31me\x1b[0m" in out, "what has no partner is unmatched"


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(result: Any) -> str:
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    return str(result.err)


def test_texts_that_differ_are_refused_with_the_reason(align: Command) -> None:
    told = refusal(align(LONG, UNKNOWN, "the 狐"))
    assert "aligner 'byte_span' cannot align this text: the tokens spell different texts from byte 4 on" in told
    assert f"{UNKNOWN}: 1 tokens are <unk>, which stands for no bytes" in told


def test_an_unknown_aligner_is_told_the_nearest(align: Command) -> None:
    told = refusal(align(SHORT, LONG, "the hen", "--aligner", "bytespan"))
    assert "aligner 'bytespan' is not registered; did you mean 'byte_span'?" in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{name: min_edit, match_costs: fusechat}",
         "aligner 'min_edit': match_costs: unknown key; did you mean 'match_cost'?"),
        ("{name: min_edit, match_cost: gold}",
         "aligner 'min_edit': match_cost: input should be 'fusellm' or 'fusechat', not 'gold'"),
        ("{name: byte_span, 1: 2}", "aligner 'byte_span': 1: unknown key; known keys: none"),
        ("{match_cost: fusechat}", "--aligner: name: this key is needed"),
        ("{name: min_edit, name: byte_span}", "': the key 'name' stands twice; keep one"),
        ("2026-13-01", "aligner '2026-13-01' is not registered"),
        ("[min_edit", "--aligner '[min_edit' must be a name, or a mapping such as '{name: min_edit, match_cost: fuse"),
    ],
)  # fmt: skip
def test_options_that_an_aligner_does_not_have_are_refused(align: Command, given: str, expected: str) -> None:
    assert expected in refusal(align(SHORT, LONG, "the hen", "--aligner", given))


def test_one_text_is_needed(align: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "text.txt").write_text("the hen")
    for arguments, expected in (
        ([], "expected a text or --file, and not both"),
        (["the hen", "--file", tmp_path / "text.txt"], "expected a text or --file, and not both"),
        ([""], "the text is empty"),
        (["--file", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["--file", tmp_path / "latin.txt"], "latin.txt is not UTF-8 at byte 3"),
        (["--file", tmp_path / "absent.txt"], "absent.txt cannot be read: No such file or directory"),
        (["--file", tmp_path], "cannot be read: Is a directory"),
    ):
        assert expected in refusal(align(SHORT, LONG, *arguments))


def test_a_tokenizer_whose_tokens_are_not_known_as_bytes_is_refused(align: Command, made: Path) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##n": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = WordPiece()
    words.save(str(made / "words.json"))
    assert "words.json: what its tokens stand for is not known" in refusal(align(SHORT, "words.json", "the hen"))
    assert "tokenizer not found: there is no './absent'" in refusal(align("absent", LONG, "the hen"))


FIRST = """
import kdflow
from kdflow.contracts import Alignment

class First(kdflow.Aligner):
    name = "first"
    def align(self, student_tokens, teacher_tokens):
        return Alignment([(slice(0, 1), slice(0, 1))])

@kdflow.hookimpl
def kdflow_aligners():
    return [First]
"""


def test_an_aligner_that_leaves_tokens_out_is_named(align: Command, site: Path) -> None:
    plugin("kdflow_first", FIRST).install(site)
    told = refusal(align(SHORT, LONG, "the hen", "--aligner", "first"))
    assert "aligner 'first' gave spans that do not partition the 7 tokens of the student" in told
